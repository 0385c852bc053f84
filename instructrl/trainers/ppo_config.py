"""The settings of `PPOTrainer`, and what it refuses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from instructrl.trainers.actor_critic import network

CHOICES = {
    "kl_estimator": ("k1", "k3"),
    "ema_every": ("iteration", "step"),
    "ptx_normalization": ("token_mean", "sequence_sum"),
}


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`, in the vocabulary of TRL 1.12's PPOConfig. Defaults are the paper's where it has them.

    Batch sizes are over all devices. `max_tokens`, `generation_batch_size` and `gradient_accumulation_steps` (the least
    number of forward passes a minibatch is cut into) change speed and memory, not results.

    Raises:
        ValueError: the settings contradict each other.
    """

    learning_rate: float = 5e-6
    """The policy's. Our choice within the paper's sweep of 2.55e-6 to 2.55e-5 (App. C.4)."""
    critic_learning_rate: float = 9e-6
    """The value function's (App. C.4)."""
    warmup_iterations: int = 10
    """Both learning rates rise from 0.1 to 1 times their peak over the first iterations, then stay (App. C.4)."""
    total_episodes: int = 256_000
    """Rounded up to whole iterations."""
    batch_size: int = 512
    """Episodes an iteration: prompts answered between two policies."""
    num_mini_batches: int = 8
    """Optimizer steps an iteration and epoch."""
    num_ppo_epochs: int = 1
    """Passes over an iteration's episodes."""
    kl_coef: float = 0.02
    """beta in eq. 2."""
    kl_estimator: str = "k1"
    """What is subtracted from the reward at each token: k1 (the paper's) or k3; see `losses.py`."""
    kl_target: float | None = None
    """Nats a response: `kl_coef` is only the first beta of a controller (`kl.py`). None: fixed, as in the paper."""
    kl_horizon: int = 10_000
    """Episodes; the controller's (Ziegler et al. 2019)."""
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    """Our choice: the paper does not say whether values are clipped; TRL's default."""
    vf_coef: float = 0.1
    """TRL's default. Under Adam and with its own clipping the critic's step hardly depends on it."""
    gamma: float = 1.0
    """The discount: none (App. C.4). The paper's gamma is `ptx_coef`."""
    lam: float = 0.95
    """GAE's lambda. The paper does not print it; as TRL and lm-human-preferences."""
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    temperature: float = 1.0
    response_length: int = 256
    """Tokens a response may have."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a response that did not end by itself."""
    missing_eos_score: float | None = None
    """The score of a response that did not end by itself, in place of its own and of the penalty (arXiv 2403.17031)."""
    stop_token_id: int | None = None
    """The token that ends a response; None: the tokenizer's EOS."""
    reward_bias: float = 0.0
    """The demonstrations' mean score, subtracted from every score and from the critic's values (App. C.2)."""
    ptx_coef: float = 0.0
    """gamma in eq. 2: 0 is PPO, the paper's 27.8 is PPO-ptx."""
    ptx_ratio: float = 8.0
    """Pretraining examples an episode (App. C.4)."""
    ptx_normalization: str = "token_mean"
    """`token_mean`: the pretraining loss is a mean over a minibatch's tokens; `sequence_sum`: a sum over an example's
    tokens, averaged over examples. The paper does not say, and `ptx_coef` only has a meaning together with it."""
    ema_decay: float = 0.992
    """Of the moving average of the policy's weights (App. C.4); 0: none. See `ema.py`."""
    ema_every: str = "iteration"
    """When the average moves: every `iteration` or every `step`. The paper does not say; its horizon of 125 fits 500
    iterations."""
    max_tokens: int | None = None
    """Tokens of a forward pass, in scoring and in updates, if it were padded. None: 4096, and 1024 on a CPU, where more
    takes memory and saves no time."""
    generation_batch_size: int = 128
    """Sequences decoded together."""
    completions_every: int = 0
    """Iterations between tables of sampled completions, the last iteration's included; 0: none."""
    num_completions: int = 8
    """Rows of such a table."""
    completions_dir: str | None = None
    """Where the tables go, one JSON Lines file each; None: `completions` in `output_dir`."""
    max_grad_norm: float = 1.0
    """For the policy and for the critic, each."""
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        eval_steps = self.eval_steps
        super().__post_init__()
        shares = self.num_mini_batches * self.world_size
        if self.batch_size % shares:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of num_mini_batches x processes = {shares}: every "
                "optimizer step must see as many episodes on every process"
            )
        if self.total_episodes < self.batch_size:
            raise ValueError(f"total_episodes={self.total_episodes} is less than one batch_size={self.batch_size}")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: PPO explores by sampling, so it must be above 0")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is neither {' nor '.join(choices)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 (none) and below 1")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"kl_target={self.kl_target} must be above 0; None keeps kl_coef fixed")
        if self.fp16:
            raise ValueError("fp16 needs one loss scaler, but policy and critic are clipped apart: set bf16 instead")
        # One Trainer step is one minibatch; what Trainer logs falls on iterations.
        self.steps_per_iteration = self.num_ppo_epochs * self.num_mini_batches
        self.num_iterations = math.ceil(self.total_episodes / self.batch_size)
        self.max_steps = self.num_iterations * self.steps_per_iteration
        self.logging_steps = self.steps_per_iteration
        self.eval_steps = eval_steps or self.steps_per_iteration
        self.max_tokens = self.max_tokens or (1024 if self.device.type == "cpu" else 4096)
        # Trainer's accumulation would count our minibatches; ours is within one.
        self.micro_batches, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        self.per_device_train_batch_size = self.batch_size // shares
        self.ignore_data_skip = True  # a resumed run begins with the right iteration by itself
        self._n_gpu = min(self.n_gpu, 1)  # no DataParallel, which cannot split our batches: use torchrun

    @property
    def ptx_batch_size(self) -> int:
        """Pretraining examples an optimizer step, over all devices."""
        return round(self.ptx_ratio * self.batch_size / self.num_mini_batches)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer") -> None:
    """Raises ValueError unless it has an EOS token and another one for padding."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the {name} has no EOS token, so no response could ever end: set tokenizer.eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the {name}'s pad token is missing or the same as EOS, which would hide where a response ends: add one "
            "with tokenizer.add_special_tokens({'pad_token': '<|pad|>'}) and resize the models' embeddings"
        )


def check_models(
    policy: PreTrainedModel | PeftModel,
    critic: PreTrainedModel | PeftModel | None,
    reference: PreTrainedModel | None,
    reward_model: PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises ValueError if two models share weights, or one cannot do what it is there for."""
    if critic is None:
        raise ValueError("value_model is missing: load the reward model a second time and pass it")
    if reference is policy:
        raise ValueError("ref_model is the policy itself, so KL would always be 0: leave it out, or load it twice")
    others = [model for model in (policy, reference, reward_model) if model is not None]
    weights = {id(parameter) for model in others for parameter in model.parameters()}
    if any(id(parameter) in weights for parameter in critic.parameters()):
        raise ValueError(
            "value_model shares its weights with another model (is it the reward model itself?), which training would "
            "change too: load the reward model a second time"
        )
    for name, model in (("value_model", critic), ("reward_model", reward_model)):
        if model is not None and (getattr(network(model), "score", None) is None or model.config.num_labels != 1):
            raise ValueError(f"{name} must be a sequence-classification model with one label and a `score` head")
    roles = (("policy", policy, tokenizer), ("value_model", critic, tokenizer))
    for name, model, words in (*roles, ("reward_model", reward_model, reward_tokenizer or tokenizer)):
        if model is not None and network(model).get_input_embeddings().num_embeddings < len(words):
            size = network(model).get_input_embeddings().num_embeddings
            raise ValueError(
                f"the {name}'s vocabulary ({size}) is smaller than the tokenizer's ({len(words)}): policy and critic "
                "must share one tokenizer, and a reward model with its own needs reward_processing_class"
            )


def check_prompts(prompts: Sequence[Sequence[int]], response_length: int, policy: PreTrainedModel) -> None:
    """Raises ValueError if there are none, one is empty, or one leaves no room for a response."""
    if not prompts:
        raise ValueError("train_dataset has no prompts")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue: give it at least a BOS token")
    longest = max(map(len, prompts))
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and longest + response_length > context:
        raise ValueError(
            f"a prompt of {longest} tokens and response_length={response_length} exceed the model's context of "
            f"{context}: drop such prompts, or shorten the response"
        )
