"""Policy and critic as one module, and the networks inside what PEFT wraps."""

import copy
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructrl.trainers import rollout
from instructrl.trainers.packing import Pack
from instructrl.trainers.sharding import as_forward, is_sharded, load, unsharded_class


class ActorCritic(nn.Module):
    """Policy and critic as one module, for one optimizer and one DDP wrapper.

    They share no weight that is trained (App. C.4); their adapters may be on one frozen base.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, critic: PreTrainedModel | PeftModel):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.config = copy.deepcopy(policy.config)  # Trainer writes into it; the policy's own is saved with the policy

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.policy, self.critic

    def forward(self, role: Literal["policy", "critic"], pack: Pack, temperature: float = 1.0) -> Tensor:
        """The policy's log-probabilities of the tokens that follow the wanted ones, or the critic's values before
        them -> [M]. One network a call: two together would keep both networks' activations for one backward pass."""
        if role == "policy":
            policy = network(self.policy)
            return as_forward(self.policy, self.policy, lambda: rollout.response_logprobs(policy, pack, temperature))
        critic = network(self.critic)
        # Not a view: FSDP warns of those.
        return as_forward(self.critic, self.critic, lambda: rollout.token_scores(critic, pack).clone())

    def activation_checkpointing_enable(self, **options: Any) -> None:
        network(self.policy).activation_checkpointing_enable(**options)
        network(self.critic).activation_checkpointing_enable(**options)


def network(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, its adapters in force; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Give the model the weights (or the adapter's) that `save_pretrained` wrote. Reads safetensors only."""
    if isinstance(model, PeftModel):
        name = model.active_adapter
        folder = folder if name == "default" else folder / name  # where PEFT saves it
        saved = load_file(folder / "adapter_model.safetensors")
        if is_sharded(model):
            load(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False), saved)
        else:
            set_peft_model_state_dict(model, saved, adapter_name=name)
        return
    saved = unsharded_class(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    if is_sharded(model):
        load(model.state_dict(keep_vars=True), saved)
    else:
        model.load_state_dict(saved)


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


def freeze(model: PreTrainedModel | PeftModel) -> None:
    """For a model that is only read: reference or reward model."""
    model.eval().requires_grad_(False)
