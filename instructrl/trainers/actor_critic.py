"""Policy and critic as one module, and the networks inside what PEFT wraps."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from instructrl.trainers import rollout


class ActorCritic(nn.Module):
    """Policy and critic as one module, for one optimizer and one DDP wrapper. They share no weights (App. C.4)."""

    def __init__(self, policy: PreTrainedModel | PeftModel, critic: PreTrainedModel | PeftModel, pad_token_id: int):
        super().__init__()
        self.policy, self.critic, self.pad_token_id = policy, critic, pad_token_id
        self.config = copy.deepcopy(policy.config)  # Trainer writes into it; the policy's own is saved with the policy

    def forward(self, input_ids: Tensor, predicts: Tensor, temperature: float, values: bool = True):
        """Log-probabilities of, and values before, the tokens that follow `predicts` [B, T] -> [M], [M] or None."""
        policy, critic = network(self.policy), network(self.critic)
        logprobs = rollout.response_logprobs(policy, input_ids, predicts, temperature, self.pad_token_id)
        return logprobs, rollout.token_scores(critic, input_ids, predicts) if values else None

    def activation_checkpointing_enable(self, **options: Any) -> None:
        network(self.policy).activation_checkpointing_enable(**options)
        network(self.critic).activation_checkpointing_enable(**options)


def network(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, its adapters in force; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Give the model the weights (or the adapter's) that `save_pretrained` wrote. Reads safetensors only."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, module or attribute, and leave the configuration as it is.

    With dropout a policy differs from itself between sampling and update: the ratio is off before the first step.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def fuse_gelu(model: nn.Module) -> None:
    """Put torch's fused tanh-GELU in the place of GPT-2's, which is the same function in eight operations."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def freeze(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """For a model that is only read: reference or reward model."""
    model.eval().requires_grad_(False).to(device)
