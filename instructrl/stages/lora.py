"""LoRA: adapters on one base model, and the plain model that one merges to (`model.lora`).

A stage trains `adapted(model, recipe)` and saves with `save`: the merged weights, so that what is downstream reads a
model like any other, and in `adapter/` beside them the adapter, from which the stages go on that train one on the same
base. https://huggingface.co/docs/peft/package_reference/lora
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import base_model, models, ranks
from instructrl.stages.contract import Contract
from instructrl.trainers.actor_critic import network
from instructrl.trainers.sharding import gathered, is_sharded, whole, whole_weights

ADAPTER = "default"  # PEFT's name of a model's only adapter
HEAD = "score"  # of a reward model
FOLDER = "adapter"  # beside the merged weights
FILE = "adapter_model.safetensors"
BASE = "base_digest"  # in that file's metadata: `base_model.digest`


def adapted(
    model: PreTrainedModel, recipe: Recipe, start: Path | None = None, trained: bool = True
) -> PreTrainedModel | PeftModel:
    """The model with an adapter, and all else frozen; without `model.lora` the model itself.

    A new adapter changes nothing yet (B is 0). It is drawn from torch's global generator, in float32 whatever the model
    is. A reward model's head is trained in full, and in float32.

    Args:
        start: a model's folder, whose adapter it begins as; and whose head, if both have one.
        trained: or frozen, too.

    Raises:
        UserError: no module of the model has a name in `target_modules`, or one is the head or the embedding; or the
            adapter in `start` is of another base model.
    """
    lora = recipe.model.lora
    if lora is None:
        return model
    scalar = getattr(model, HEAD, None) is not None
    check_targets(model, lora.target_modules)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed weights
        modules_to_save=[HEAD] if scalar else None,
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
    )
    # PEFT would look up the model of that name, and save an embedding that differs from it with every checkpoint.
    model.name_or_path = None
    wrapped = get_peft_model(model, settings)
    if getattr(model, "is_loaded_in_4bit", False):
        model.is_loaded_in_4bit = False  # or TRL would round the adapter to bfloat16
    if scalar:
        trained_in_float32(getattr(model, HEAD).modules_to_save[ADAPTER])
    if start:
        begin_as(wrapped, start)
    return wrapped if trained else wrapped.requires_grad_(False).eval()


def check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Refuse what PEFT would not find, and a head: losses read its own weights and would not see an adapter."""
    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    } - {HEAD, "lm_head", "embed_out"}
    for target in targets:
        if target not in linear:
            raise UserError(
                f"model.lora.target_modules: '{target}' is no matrix of a {model.config.model_type} model that can be "
                f"adapted; there are {', '.join(sorted(linear))}."
            )


def trained_in_float32(head: nn.Module) -> None:
    """Keep the head's weights in float32, for steps too small for bfloat16, and what it reads as well."""
    head.float()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))


# ---- saved -----------------------------------------------------------------------------------------------------------


def save(model: PreTrainedModel | PeftModel, contract: Contract, folder: Path, base: Mapping[str, str | None]) -> None:
    """Write a model as `models.save` does, merged if it has an adapter, and that adapter to `folder/adapter`.

    base: `base_model.identity`, for the adapter's configuration.
    """
    models.save(network(model), contract, folder, merged_weights(model))
    if isinstance(model, PeftModel):
        save_adapter(model, folder / FOLDER, base)


def save_adapter(model: PeftModel, folder: Path, base: Mapping[str, str | None]) -> None:
    """In PEFT's form, as `PeftModel.from_pretrained` reads it. Rank 0 writes; collective if the model is sharded."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = gathered(weights) if is_sharded(model) else weights
    metadata = {BASE: base_model.digest(network(model))}  # of two entries the order would differ between processes
    if ranks.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous().cpu() for name, weight in weights.items()}, folder / FILE, metadata)
    settings = copy.copy(model.peft_config[ADAPTER])
    written = {
        "inference_mode": True,
        "modules_to_save": [HEAD] if getattr(network(model), HEAD, None) is not None else None,
        "target_modules": sorted(settings.target_modules),  # a set, whose order differs between processes
    }
    for name, value in (written | dict(base)).items():
        setattr(settings, name, value)
    settings.save_pretrained(folder)


def begin_as(model: PeftModel, start: Path) -> None:
    """Give the model the adapter saved with the model at `start`; and the head, if both have one.

    Raises:
        UserError: it is of another base model.
    """
    with safe_open(start / FOLDER / FILE, framework="pt") as file:
        base = file.metadata()[BASE]
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    if base != base_model.digest(network(model)):
        raise UserError(
            f"The adapter of {start} was trained on another base model than model.path is now; set model.revision, "
            "and delete that artifact if it cannot be had any more."
        )
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = [name for name in own if name not in saved and HEAD not in name]
    if missing:
        raise UserError(f"The adapter of {start} has no {missing[0]}.")
    set_peft_model_state_dict(model, {name: saved.get(name, weight) for name, weight in own.items()})


# ---- merged ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor] | None:
    """The weights of the plain model that computes the same, by the names and in the precision that it has without an
    adapter, as `models.save` takes them; None for a model that has no adapter and is not sharded. What is in 4 bits is
    so no more. Of a sharded model rank 0 has all of them, others nothing: collective.

    The sums are taken in float32, and `model` stays as it is: subtracting again what was added would not give back the
    same weights. Memory: a second model on the CPU, and on the device one matrix.
    """
    if not isinstance(model, PeftModel):
        return whole_weights(model)
    base, found, sharded = network(model), {}, is_sharded(model)
    packed = packed_matrices(base)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    seen: dict[int, Tensor] = {}  # a weight under two names stays one tensor: the second is not saved
    for name, parameter in base.state_dict(keep_vars=True).items():
        matrix, _, rest = name.rpartition(".weight")
        if ".lora_" in name or ".original_module." in name or (matrix in packed and rest):  # rest: constants of 4 bits
            continue
        weight = whole(parameter.detach())
        if matrix in packed:
            weight = dequantize_bnb_weight(base.get_submodule(matrix).weight).to(base.dtype)
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            update = whole(layer.get_delta_weight(ADAPTER))
            weight = (weight.float() + update.float()).to(weight.dtype).cpu()
        elif f".modules_to_save.{ADAPTER}." in name:
            weight = weight.to(base.dtype)
        weight = weight.T.contiguous() if packed.get(matrix, False) else weight
        if not sharded or ranks.rank() == 0:
            found[plain_name(name)] = seen.setdefault(id(parameter), weight.cpu() if sharded else weight)
    return found


def plain_name(name: str) -> str:
    """A weight's name in the model without an adapter."""
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


def packed_matrices(base: PreTrainedModel) -> dict[str, bool]:
    """{name of a module in 4 bits: whether the plain model has its matrix transposed, as GPT-2 does}."""
    names = [
        name
        for name, module in base.named_modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
        and not isinstance(module, LoraLayer)  # which has its base layer's
    ]
    plain = models.unquantized(base) if names else base
    inner = (name.removesuffix(".base_layer") for name in names)
    return {name: isinstance(plain.get_submodule(own), Conv1D) for name, own in zip(names, inner, strict=True)}
