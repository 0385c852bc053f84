"""The four models of PPO: each with its own weights, or with `model.lora` as adapters and heads on one base model."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from instructrl.config import PPO, Recipe
from instructrl.stages import base_model, lora, models
from instructrl.stages.contract import Contract

AnyModel = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Roles:
    """Who takes part in PPO."""

    policy: AnyModel
    critic: AnyModel
    """A copy of the reward model (paper, 3.5), to be trained."""
    reward_model: AnyModel
    reference: AnyModel | None
    """What the KL penalty is measured from; None: the policy as it begins, of which the trainer makes a copy."""
    bias: float
    """The demonstrations' mean score, to be subtracted from every score."""

    @classmethod
    def of(cls, section: PPO, recipe: Recipe, inputs: dict[str, Path], contract: Contract) -> "Roles":
        """The models that a section of the recipe starts from.

        Raises:
            UserError: one cannot be loaded, or is an adapter of another base model.
        """
        init, scoring = inputs[section.init] / "model", inputs["reward_model"] / "model"
        if recipe.model.lora is None:
            where = models.nursery(recipe)
            policy = models.load_policy(init, recipe, where)
            reward_model, bias = models.load_reward_model(scoring, recipe, where)
            critic, _ = models.load_reward_model(scoring, recipe, where)
            return cls(policy, critic, reward_model, None, bias)
        base = base_model.load(inputs, recipe, contract)
        bias = models.load_bias(scoring, recipe)
        policy, reference = (base_model.twin(base) for _ in range(2))
        critic, reward_model = (base_model.scorer(base) for _ in range(2))
        critic.config.reward_bias = bias
        return cls(
            lora.adapted(policy, recipe, init),
            lora.adapted(critic, recipe, scoring),
            lora.adapted(reward_model, recipe, scoring, trained=False),
            lora.adapted(reference, recipe, init, trained=False),
            bias,
        )
