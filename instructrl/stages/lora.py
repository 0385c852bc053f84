"""LoRA: an adapter on a stage's model while it trains, and the plain model that it leaves (`model.lora`).

A stage trains `adapted(model, recipe)` and saves `network(model)` with the `merged_weights`, so that what is downstream
reads a model like any other. https://huggingface.co/docs/peft/package_reference/lora
"""

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.trainers.actor_critic import network

ADAPTER = "default"  # PEFT's name of a model's only adapter
HEAD = "score"  # of a reward model


def adapted(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The model with a new adapter, which changes nothing yet (B is 0), and all else frozen; without `model.lora` the
    model itself. The adapter is drawn from torch's global generator, in float32 whatever the model is.

    A reward model's head is trained in full, and in float32.

    Raises:
        UserError: no module of the model has a name in `target_modules`, or one is the head or the embedding.
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
    if scalar:
        trained_in_float32(getattr(model, HEAD).modules_to_save[ADAPTER])
    return wrapped


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


@torch.no_grad()
def merged_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor] | None:
    """The weights of the plain model that computes the same, by the names and in the precision that it has without an
    adapter, as `models.save` takes them; None for a model that has no adapter.

    The sums are taken in float32, and `model` stays as it is: subtracting again what was added would not give back the
    same weights. Memory: a second model on the CPU, and on the device one matrix.
    """
    if not isinstance(model, PeftModel):
        return None
    base, found = network(model), {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in base.state_dict().items():
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if ".lora_" in name or ".original_module." in name:
            continue
        if layer is not None:
            update = layer.get_delta_weight(ADAPTER)
            weight = (weight.float() + update.float()).to(weight.dtype).cpu()
        elif f".modules_to_save.{ADAPTER}." in name:
            weight = weight.to(base.dtype)
        found[name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")] = weight
    return found
