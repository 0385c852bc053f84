"""The base model of adapters (`model.lora`), loaded once for all that read it.

Each role of a stage is a tree of modules of its own, with its own adapter and head, on the same tensors: `twin` for
what predicts words, `scorer` for what gives scores. Nothing is switched, so that one role's adapter cannot be in force
in another's forward pass, nor in the second one of `runtime.gradient_checkpointing`.
"""

import copy
import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import models
from instructrl.stages.contract import Contract
from instructrl.trainers.sharding import whole

SAMPLED = 256  # numbers of each tensor that tell one base model from another


def path_of(inputs: Mapping[str, Path], recipe: Recipe) -> Path | str:
    """Where the base model is: what `pretrain` made, or the recipe's folder or Hub id."""
    return inputs["pretrain"] / "model" if "pretrain" in inputs else recipe.model.path


def identity(inputs: Mapping[str, Path], recipe: Recipe) -> dict[str, str | None]:
    """What an adapter's configuration says of its base model: the recipe's folder or Hub id and commit, or pretrain's
    artifact, wherever that lies."""
    if "pretrain" in inputs:
        return {"base_model_name_or_path": f"pretrain/{inputs['pretrain'].name}/model"}
    return {"base_model_name_or_path": recipe.model.path, "revision": recipe.model.revision}


def load(inputs: Mapping[str, Path], recipe: Recipe, contract: Contract) -> PreTrainedModel:
    """The base model as `sft` adapts it: frozen, with rows for the contract's tokens.

    Raises:
        UserError: it cannot be loaded.
    """
    model = models.load_base(path_of(inputs, recipe), recipe)
    models.fit(model, contract)
    return model.requires_grad_(False)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another tree of modules on the same tensors, which nobody may train."""
    tensors = chain(model.parameters(), model.buffers())
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())  # of 4-bit weights
    return copy.deepcopy(model, {id(kept): kept for kept in chain(tensors, filter(None, states))})


def scorer(base: PreTrainedModel) -> PreTrainedModel:
    """The trunk of a language model, its tensors shared, with a scalar head as `models.init_reward_model` draws it.

    Raises:
        UserError: its architecture has no such model, or one with more than trunk and head.
    """
    twin_ = twin(base)
    config, kind = twin_.config, base.config.model_type
    config.num_labels = 1
    vars(config).pop("quantization_config", None)  # the head is as it was drawn
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"model.path: transformers has no {kind} model with a scalar head.") from error
    setattr(model, model.base_model_prefix, twin_.base_model)
    width = model.score.in_features
    model.score = nn.Linear(width, 1, bias=False, dtype=base.dtype, device=base.device)
    models.draw_head(model)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise UserError(f"model.lora: a {kind} model with a scalar head is more than its trunk and that head.")
    return model.eval()


@torch.no_grad()
def digest(model: PreTrainedModel) -> str:
    """A hash that differs from another base model's: of the names, shapes and some numbers of the trunk's tensors.

    It is the same with an adapter as without. Only the shape counts of 4-bit weights, which another device may round to
    others, and of the embedding, whose new rows (`models.make_room`) it may. Collective if the model is sharded.
    """
    found, embedding = hashlib.sha256(), model.get_input_embeddings().weight
    for name, parameter in model.base_model.named_parameters():
        if ".lora_" in name:
            continue
        found.update(f"{name.replace('.base_layer.', '.')} {tuple(parameter.shape)}".encode())
        if parameter.is_floating_point() and parameter is not embedding:
            flat = whole(parameter.detach()).flatten()
            found.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
