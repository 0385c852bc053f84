"""The settings of `PPOTrainer`."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments

CHOICES = {
    "kl_estimator": ("k1", "k3"),
    "ema_every": ("iteration", "step"),
    "sharding": ("none", "fsdp", "zero1", "zero2", "zero3"),
    "ptx_normalization": ("token_mean", "sequence_sum"),
    "vllm_mode": ("colocate", "server"),
}


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`, in the vocabulary of TRL 1.12's PPOConfig. Defaults are the paper's where it has them.

    Batch sizes are over all devices. `max_tokens`, `generation_batch_size` and `gradient_accumulation_steps` (about as
    many forward passes a minibatch is cut into) change speed and memory, not results.

    Computed, and not read: `max_steps`, `logging_steps`, `per_device_train_batch_size`, `num_train_epochs`, and the
    scheduler's settings; `total_episodes`, `batch_size`, `num_mini_batches` and `warmup_iterations` say all of it.

    Raises:
        ValueError: the settings contradict each other.
    """

    learning_rate: float = 5e-6
    """The policy's. Our choice within the paper's sweep of 2.55e-6 to 2.55e-5 (App. C.4)."""
    critic_learning_rate: float = 9e-6
    """The value function's (App. C.4)."""
    warmup_iterations: int = 10
    """Both learning rates rise from 0.1 to 1 times their peak over the first iterations, then stay (App. C.4)."""
    final_learning_rate_share: float = 1.0
    """What is left of both learning rates at the end, after a straight line from the warm-up's end on; 1: they stay, as
    in the paper."""
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
    """The score of a response that did not end by itself, in place of its own and of the penalty (arXiv 2403.17031);
    no bias is subtracted from it."""
    stop_token_id: int | None = None
    """The token that ends a response, where the reward model then reads its score; None: the tokenizer's EOS. Another
    token makes EOS one like all others."""
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
    use_vllm: bool = False
    """Have vLLM sample the responses, as TRL runs it (`engine.py`; the names are those of TRL's GRPOConfig). The ratio
    knows our own log-probabilities only."""
    vllm_mode: str = "colocate"
    """`colocate`: inside each process, on its GPU; `server`: behind `vllm serve`."""
    vllm_model: str | None = None
    """The folder or Hub id that vLLM starts from; its weights are replaced. None: the policy's own."""
    vllm_server_base_url: str = "http://localhost:8000"
    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server to be up."""
    vllm_group_port: int = 51216
    """Where the server's processes meet this one to be given the weights."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of a GPU's memory that a colocated vLLM takes."""
    vllm_tensor_parallel_size: int = 1
    """Processes that share one colocated vLLM."""
    vllm_max_model_length: int | None = None
    """Tokens of a prompt and its response. None: of the longest prompt that the trainer was given."""
    vllm_max_logprob_difference: float = 0.1
    """Nats a token: by more, on average, vLLM's log-probabilities of what it sampled must not differ from ours. Our
    choice: in bfloat16 they differ by about a hundredth."""
    completions_every: int = 0
    """Iterations between tables of sampled completions, the last iteration's included; 0: none."""
    num_completions: int = 8
    """Rows of such a table."""
    completions_dir: str | None = None
    """Where the tables go, one JSON Lines file each; None: `completions` in `output_dir`."""
    sharding: str = "none"
    """What the processes share: `fsdp` the weights of all models, gradients and optimizer state (`sharding.py`);
    `zero1` to `zero3` what DeepSpeed's stages do (`zero.py`)."""
    max_grad_norm: float = 1.0
    """For the policy and for the critic, each."""
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        eval_steps = self.eval_steps
        super().__post_init__()
        for name in ("batch_size", "num_mini_batches", "num_ppo_epochs", "response_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_steps > 0:
            raise ValueError(f"max_steps={self.max_steps}: the length of training is total_episodes")
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: policy and critic are saved apart; load the best checkpoint later"
            )
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
        if self.ptx_coef and self.ptx_batch_size < self.world_size:
            raise ValueError(
                f"ptx_ratio={self.ptx_ratio} leaves {self.ptx_batch_size} pretraining examples a step for "
                f"{self.world_size} processes: raise it, or batch_size"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 (none) and below 1")
        if not 0 <= self.final_learning_rate_share <= 1:
            raise ValueError(f"final_learning_rate_share={self.final_learning_rate_share} must be from 0 to 1")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"kl_target={self.kl_target} must be above 0; None keeps kl_coef fixed")
        if self.use_vllm and self.vllm_mode == "colocate" and self.world_size % self.vllm_tensor_parallel_size:
            raise ValueError(
                f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size} does not divide the {self.world_size} "
                "processes"
            )
        if self.fp16:
            raise ValueError("fp16 needs one loss scaler, but policy and critic are clipped apart: set bf16 instead")
        # One Trainer step is one minibatch; what Trainer logs falls on iterations.
        self.steps_per_iteration = self.num_ppo_epochs * self.num_mini_batches
        self.num_iterations = math.ceil(self.total_episodes / self.batch_size)
        self.max_steps = self.num_iterations * self.steps_per_iteration
        self.logging_steps = self.steps_per_iteration
        self.logging_first_step = False  # an iteration's numbers are one line
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
