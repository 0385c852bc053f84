"""What `PPOTrainer` refuses before anything trains: each check does nothing, or raises ValueError with one sentence."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructrl.trainers.actor_critic import network
from instructrl.trainers.rollout import next_token_logits

AnyModel = PreTrainedModel | PeftModel


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer") -> None:
    """It has an EOS token, and another one for padding."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the {name} has no EOS token, so no response could ever end: set tokenizer.eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the {name}'s pad token is missing or the same as EOS, which would hide where a response ends: add one "
            "with tokenizer.add_special_tokens({'pad_token': '<|pad|>'}) and resize the models' embeddings"
        )


def check_models(
    policy: AnyModel,
    critic: AnyModel | None,
    reference: AnyModel | None,
    reward_model: AnyModel | None,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Each can do what it is there for, and none shares a weight that is trained with another."""
    if critic is None:
        raise ValueError("value_model is missing: load the reward model a second time and pass it")
    if reference is policy:
        raise ValueError("ref_model is the policy itself, so KL would always be 0: leave it out, or load it twice")
    if critic is reward_model or shares_weights(critic, policy, reference, reward_model):
        raise ValueError(
            "value_model shares its weights with another model (is it the reward model itself?), which training would "
            "change too: load the reward model a second time"
        )
    for name, model in (("ref_model", reference), ("reward_model", reward_model)):
        if model is not None and shares_weights(policy, model):
            raise ValueError(f"{name} shares its weights with the policy, which training would change: load it twice")
    for name, model in (("value_model", critic), ("reward_model", reward_model)):
        if model is not None and (getattr(network(model), "score", None) is None or model.config.num_labels != 1):
            raise ValueError(f"{name} must be a sequence-classification model with one label and a `score` head")
    readers = {"policy": policy, "value_model": critic, "ref_model": reference, "reward_model": reward_model}
    for name, model in readers.items():
        words = reward_tokenizer if name == "reward_model" and reward_tokenizer else tokenizer
        size = model and network(model).get_input_embeddings().num_embeddings
        if size is not None and size < len(words):
            raise ValueError(
                f"the {name}'s vocabulary ({size}) is smaller than the tokenizer's ({len(words)}): policy, reference "
                "and critic must share one tokenizer, and a reward model with its own needs reward_processing_class"
            )


def shares_weights(model: AnyModel, *others: AnyModel | None) -> bool:
    """Whether they have a weight in common that is not frozen. (Adapters may be on one frozen base model.)"""
    weights = {id(parameter) for other in others if other is not None for parameter in other.parameters()}
    return any(id(parameter) in weights for parameter in model.parameters() if parameter.requires_grad)


def check_adapter(name: str, model: AnyModel) -> None:
    """PEFT's learnt prompts live outside the network that is called here."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{name} has an adapter of learnt prompts, which would be ignored: use LoRA or its kin")


@torch.no_grad()
def check_logits(policy: PreTrainedModel, prompt: Sequence[int]) -> None:
    """Its logits are its head's of its trunk's output: so they are computed here, for chosen positions only."""
    ids = torch.tensor([list(prompt)], device=policy.device)
    ours = next_token_logits(policy, policy.base_model(ids, use_cache=False).last_hidden_state, None)
    if not torch.allclose(ours.float(), policy(ids, use_cache=False).logits.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(f"the logits of a {policy.config.model_type} model are more than its head: not supported")


def check_prompts(prompts: Sequence[Sequence[int]], response_length: int, readers: dict[str, AnyModel | None]) -> None:
    """There are some, none is empty, and each leaves room for a response in the context of everyone who reads it."""
    if not prompts:
        raise ValueError("the data set has no prompts")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue: give it at least a BOS token")
    longest = max(map(len, prompts))
    for name, model in readers.items():
        context = model and getattr(network(model).config, "max_position_embeddings", None)
        if context and longest + response_length > context:
            raise ValueError(
                f"a prompt of {longest} tokens and response_length={response_length} exceed the {name}'s context of "
                f"{context}: drop such prompts, or shorten the response"
            )
