"""PPO and PPO-ptx as in InstructGPT (arXiv 2203.02155, section 3.5 eq. 2, App. C.3 and C.4).

Top to bottom: the settings; policy and critic; `PPOTrainer`, which follows the paper's loop (sample, score, shape the
rewards, estimate advantages, update on minibatches, add the pretraining gradient); its log; its checkpoints.
"""

import copy
import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from instructrl.trainers import losses, rollout


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`, in the vocabulary of TRL 1.12's PPOConfig. Defaults are the paper's where it has them.

    Batch sizes are over all devices. `max_tokens` and `generation_batch_size` change speed and memory, not results.
    """

    learning_rate: float = 5e-6
    """The policy's. Our choice within the paper's sweep of 2.55e-6 to 2.55e-5."""
    critic_learning_rate: float = 9e-6
    """App. C.4."""
    warmup_iterations: int = 10
    """Both learning rates rise from 0.1 to 1 times their peak over the first iterations, then stay (App. C.4)."""
    total_episodes: int = 256_000
    batch_size: int = 512
    """Episodes an iteration: prompts answered before the policy changes."""
    num_mini_batches: int = 8
    """Optimizer steps an iteration and epoch."""
    num_ppo_epochs: int = 1
    kl_coef: float = 0.02
    """beta in eq. 2."""
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    """The discount; the paper's gamma is `ptx_coef`."""
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    temperature: float = 1.0
    response_length: int = 256
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a response that did not end by itself."""
    reward_bias: float = 0.0
    """The demonstrations' mean score, subtracted from every score and from the critic's values (App. C.2)."""
    ptx_coef: float = 0.0
    """gamma in eq. 2: 0 is PPO, the paper's 27.8 is PPO-ptx."""
    ptx_ratio: float = 8.0
    """Pretraining examples an episode (App. C.4)."""
    ptx_normalization: str = "token_mean"
    """`token_mean`: the pretraining loss is a mean over a minibatch's tokens; `sequence_sum`: a sum over an example's tokens,
    averaged over examples. The paper does not say; `ptx_coef` only has a meaning together with it."""
    max_tokens: int = 4096
    """Padded tokens of a forward pass, in scoring and in updates."""
    generation_batch_size: int = 128
    """Sequences decoded together."""
    max_grad_norm: float = 1.0
    """For the policy and for the critic, each."""
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        super().__post_init__()
        shares = self.num_mini_batches * self.world_size
        if self.batch_size % shares:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of num_mini_batches x processes = {shares}: "
                "every optimizer step must see as many episodes on every process"
            )
        if self.total_episodes < self.batch_size:
            raise ValueError(f"total_episodes={self.total_episodes} is less than one batch_size={self.batch_size}")
        if self.ptx_normalization not in ("token_mean", "sequence_sum"):
            raise ValueError(f"ptx_normalization={self.ptx_normalization!r} is neither token_mean nor sequence_sum")
        if self.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps has no meaning in PPO: set max_tokens to bound a forward pass")
        if self.fp16:
            raise ValueError("fp16 needs a loss scaler, which PPO's two clipped gradients do not share: set bf16 instead")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: PPO explores by sampling, so it must be above 0")
        # One Trainer step is one minibatch, and log and checkpoint lines fall on iterations.
        self.steps_per_iteration = self.num_ppo_epochs * self.num_mini_batches
        self.num_iterations = math.ceil(self.total_episodes / self.batch_size)
        self.max_steps = self.num_iterations * self.steps_per_iteration
        self.logging_steps = self.steps_per_iteration
        self.per_device_train_batch_size = self.batch_size // shares
        self.ignore_data_skip = True  # Experience goes on from the right iteration by itself
        self._n_gpu = min(self.n_gpu, 1)  # several GPUs of one process: use torchrun; DataParallel cannot split our batches


class ActorCritic(nn.Module):
    """Policy and critic as one module: one optimizer, one DDP wrapper. The paper keeps their weights apart (App. C.4)."""

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel, pad_token_id: int):
        super().__init__()
        self.policy, self.critic, self.pad_token_id = policy, critic, pad_token_id
        self.config = copy.deepcopy(policy.config)  # Trainer writes into it; the policy's is saved with the policy

    def forward(self, input_ids: Tensor, predicts: Tensor, temperature: float, values: bool = True):
        """Log-probabilities of, and values before, the tokens that follow `predicts` [B, T] -> [M], [M] or None."""
        logprobs = rollout.response_logprobs(self.policy, input_ids, predicts, temperature, self.pad_token_id)
        return logprobs, rollout.token_scores(self.critic, input_ids, predicts) if values else None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        self.critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


@dataclass
class Episodes:
    """One iteration's experience: B responses, padded to R tokens. Every process holds all of it."""

    sequences: list[list[int]]
    """Prompt and response."""
    prompt_lengths: list[int]
    mask: Tensor
    """[B, R] bool: real response tokens, EOS included."""
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    """[B, R] each; `values` is the critic's before the token."""
    scores: Tensor
    """[B]: reward model and reward functions, the bias subtracted, before the penalty for a missing EOS."""
    ended: Tensor
    """[B] bool: the response ended by itself."""
    advantages: Tensor | None = None
    returns: Tensor | None = None
    """[B, R] each."""


class Passes:
    """Endless passes over `size` rows, each in an order of its own: a function of (seed, position), so nothing to save."""

    def __init__(self, size: int, *seed: Any):
        self.size, self.seed, self.order_of = size, seed, (-1, [])

    def rows(self, start: int, count: int) -> list[int]:
        """The rows at the positions from `start` on."""
        return [self.row(position) for position in range(start, start + count)]

    def row(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        if self.order_of[0] != number:
            self.order_of = number, torch.randperm(self.size, generator=seeded(*self.seed, number)).tolist()
        return self.order_of[1][offset]


def seeded(*parts: Any) -> torch.Generator:
    """A CPU generator whose seed mixes all the parts, so that streams of neighbouring seeds or iterations never meet."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Experience:
    """The "dataloader": it samples a batch of episodes, then yields its minibatches, once for every PPO epoch."""

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.args.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, args = self.trainer, self.trainer.args
        for iteration in range(trainer.state.global_step // args.steps_per_iteration, args.num_iterations):
            episodes = trainer.experience(iteration)
            for epoch in range(args.num_ppo_epochs):
                order = torch.randperm(args.batch_size, generator=seeded(args.seed, "minibatches", iteration, epoch))
                for rows in order.chunk(args.num_mini_batches):
                    yield {"episodes": episodes, "rows": rows.tolist()}


class RolloutBoundary(TrainerCallback):
    """Puts saving, evaluating and stopping off to the end of an iteration: there is no half-used experience to save there,
    which makes resuming exact."""

    wishes = ("should_save", "should_evaluate", "should_training_stop")

    def __init__(self):
        self.pending: set[str] = set()

    def on_step_end(self, args, state, control, **kwargs):
        self.pending |= {wish for wish in self.wishes if getattr(control, wish)}
        at_boundary = state.global_step % args.steps_per_iteration == 0
        for wish in self.pending:
            setattr(control, wish, at_boundary)
        if at_boundary:
            self.pending.clear()
        return control


class PPOTrainer(Trainer):
    """Clipped PPO against a reward model with a per-token KL penalty, and the pretraining term of PPO-ptx.

    Args:
        args: a `PPOConfig`.
        processing_class: the tokenizer of all the models; its pad token must differ from EOS.
        model: the policy, a causal language model.
        train_dataset: rows with `prompt_ids` (list of int), or `prompt` (text, tokenised as it is). Further columns go to
            `reward_funcs`.
        reward_model: a sequence-classification model with one label, read at the last token.
        value_model: the critic; the paper starts it from a copy of the reward model. It must be an object of its own.
        ref_model: what KL is measured from; by default a frozen copy of the policy as it is now.
        reward_funcs: functions with TRL's signature (`prompts`, `completions`, `completion_ids`, further columns) that
            return a score a completion; all scores add up.
        ptx_dataset: rows with `input_ids`, for `ptx_coef > 0`. Examples are cut at the model's context.

    Departures from the paper: values are clipped too (as TRL and lm-human-preferences do); responses without EOS lose
    `missing_eos_penalty`. From TRL 1.12: the score sits on EOS, not one slot later; the gradients of policy and critic are
    clipped (each by itself); losses are means over a minibatch's tokens, not over a micro-batch's; the learning rate
    warms up by iterations.
    """

    loss_is_scaled_for_ga = True  # every micro-batch is already divided by its minibatch's tokens

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        train_dataset: Sequence[dict[str, Any]],
        value_model: PreTrainedModel,
        reward_model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        reward_funcs: Sequence[Callable[..., list[float]]] = (),
        ptx_dataset: Sequence[dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ):
        self.processing_class = processing_class
        self.eos_id, self.pad_id = processing_class.eos_token_id, processing_class.pad_token_id
        self.reward_model, self.reward_funcs = reward_model, list(reward_funcs)
        self.ref_model = ref_model if ref_model is not None else copy.deepcopy(model)
        self.ptx_dataset = ptx_dataset if args.ptx_coef else None
        check(self, args, model, value_model, train_dataset)
        for frozen in (self.ref_model, self.reward_model):
            if frozen is not None:
                frozen.eval().requires_grad_(False).to(args.device)
        for each in (model, value_model, self.ref_model, self.reward_model):
            if each is not None:
                rollout.disable_dropout(each)
        super().__init__(
            model=ActorCritic(model, value_model, self.pad_id),
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=list,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(RolloutBoundary)
        self.prompt_order = Passes(len(train_dataset), args.seed, "prompts")
        self.ptx_order = Passes(len(self.ptx_dataset), args.seed, "ptx") if self.ptx_dataset is not None else None
        self.seconds: Counter[str] = Counter()  # by phase
        self.stats: dict[str, list[float]] = defaultdict(list)  # since the last log line
        self.last_episodes: Episodes | None = None

    def train(self, *args, **kwargs):
        self.add_callback(self.pop_callback(RolloutBoundary))  # after all others, whose wishes it may put off
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Experience:
        return Experience(self)

    @contextmanager
    def clock(self, phase: str):
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[phase] += elapsed
        self.stats[f"seconds/{phase}"].append(elapsed)

    # ---- experience ---------------------------------------------------------------------------------------------------

    def experience(self, iteration: int) -> Episodes:
        """Sample and score one batch of episodes, each process its share, and estimate the advantages of all."""
        args = self.args
        numbers = self.prompt_order.rows(iteration * args.batch_size, args.batch_size)
        uniforms = torch.rand(
            args.batch_size, args.response_length, generator=seeded(args.seed, "sampling", iteration)
        )
        share = slice(args.process_index, None, args.world_size)
        own = self.sample_and_score(fetch(self.train_dataset, numbers[share]), uniforms[share])
        episodes = gather(own, args.world_size)
        self.estimate_advantages(episodes)
        self.record_rollout(episodes)
        self.last_episodes = episodes
        return episodes

    @torch.no_grad()
    def sample_and_score(self, rows: list[dict[str, Any]], uniforms: Tensor) -> dict[str, list]:
        """Answer this process's prompts: everything about each episode, as lists."""
        args, actor_critic = self.args, self.accelerator.unwrap_model(self.model)
        prompts = [prompt_ids(row, self.processing_class) for row in rows]
        scoring = {"pad_token_id": self.pad_id, "max_tokens": args.max_tokens}
        actor_critic.eval()
        with self.accelerator.autocast():
            with self.clock("rollout"):
                completions = rollout.generate(
                    actor_critic.policy,
                    prompts,
                    max_new_tokens=args.response_length,
                    temperature=args.temperature,
                    eos_token_id=self.eos_id,
                    pad_token_id=self.pad_id,
                    uniforms=uniforms,
                    batch_size=args.generation_batch_size,
                )
            with self.clock("scoring"):
                responses = [completion.ids for completion in completions]
                sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
                starts = [len(prompt) for prompt in prompts]
                logprobs = [completion.logprobs for completion in completions]
                if args.bf16 or actor_critic.policy.dtype != torch.float32:
                    # In bf16 sampler and scoring forward differ by up to 14 % in the ratio: score again.
                    logprobs = rollout.score_logprobs(
                        actor_critic.policy, sequences, starts, temperature=args.temperature, **scoring
                    )
                ref_logprobs = rollout.score_logprobs(
                    self.ref_model, sequences, starts, temperature=args.temperature, **scoring
                )
                values = rollout.score_values(actor_critic.critic, sequences, starts, **scoring)
                scores = self.score(rows, prompts, responses, sequences)
        return {
            "sequences": sequences,
            "prompt_lengths": starts,
            "old_logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            # Shifted like the scores: the critic starts as the reward model, so V(EOS) is the score from the first step.
            "values": [value - args.reward_bias for value in values],
            "scores": scores,
            "ended": [response[-1] == self.eos_id for response in responses],
        }

    def score(self, rows, prompts, responses, sequences) -> list[float]:
        """The score of each response, the reward model's bias subtracted."""
        scores = torch.zeros(len(rows))
        if self.reward_model is not None:
            scores += rollout.score_rewards(
                self.reward_model, sequences, pad_token_id=self.pad_id, max_tokens=self.args.max_tokens
            )
        if self.reward_funcs:
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
            texts = self.processing_class.batch_decode(responses, skip_special_tokens=True)
            prompt_texts = self.processing_class.batch_decode(prompts, skip_special_tokens=True)
            for function in self.reward_funcs:
                name = getattr(function, "__name__", type(function).__name__)
                result = function(prompts=prompt_texts, completions=texts, completion_ids=responses, **columns)
                if len(result) != len(rows):
                    raise ValueError(f"reward function {name} returned {len(result)} scores for {len(rows)} completions")
                scores += torch.tensor(result, dtype=torch.float32)
        if not torch.isfinite(scores).all():
            row = int((~torch.isfinite(scores)).nonzero()[0])
            raise ValueError(f"the score of a response is {scores[row].item()}: {texts_of(self, responses[row])!r}")
        return (scores - self.args.reward_bias).tolist()

    def estimate_advantages(self, episodes: Episodes) -> None:
        """Rewards (KL at every token, the score at the last) to advantages and returns, over the whole batch."""
        args, mask = self.args, episodes.mask
        score = episodes.scores - args.missing_eos_penalty * ~episodes.ended
        rewards = losses.shaped_rewards(score, episodes.old_logprobs, episodes.ref_logprobs, mask, args.kl_coef)
        if args.whiten_rewards:
            rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
        advantages, episodes.returns = losses.gae(rewards, episodes.values, mask, args.gamma, args.lam)
        # Returns come from the advantages before whitening: the critic learns rewards, not standard deviations.
        episodes.advantages = losses.masked_whiten(advantages, mask) if args.whiten_advantages else advantages

    # ---- update -------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Gradients of one minibatch: pretraining first, then PPO, accumulated into the same buffers (App. C.4).

        Accumulated, not stepped twice: Adam would rescale each step, and `ptx_coef` would lose its meaning.
        """
        model.train()
        pretraining = None
        if self.ptx_dataset is not None:
            with self.clock("ptx"):
                self.pretraining_gradients(model)
                pretraining = [None if p.grad is None else p.grad.clone() for p in self.model.policy.parameters()]
        with self.clock("update"):
            loss = self.ppo_gradients(model, inputs["episodes"], inputs["rows"])
        if pretraining is not None:
            self.record_gradients(pretraining)
        return loss

    def ppo_gradients(self, model: nn.Module, episodes: Episodes, rows: list[int]) -> Tensor:
        """Back-propagate the clipped losses of a minibatch, this process's share, in micro-batches of like length."""
        args = self.args
        num_tokens = int(episodes.mask[rows].sum())
        own = rows[args.process_index :: args.world_size]
        batches = rollout.length_batches([len(episodes.sequences[row]) for row in own], args.max_tokens)
        total, sums = torch.zeros((), device=args.device), torch.zeros(6, device=args.device)
        for number, batch in enumerate(batches):
            micro = [own[index] for index in batch]
            mask = episodes.mask[micro]
            old, advantages, old_values, returns = (
                tensor[micro][mask].to(args.device)  # [M], row by row as `predicts` lays tokens out
                for tensor in (episodes.old_logprobs, episodes.advantages, episodes.values, episodes.returns)
            )
            inputs = self.padded([episodes.sequences[row] for row in micro], [episodes.prompt_lengths[r] for r in micro])
            with nullcontext() if number == len(batches) - 1 else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    logprobs, values = model(*inputs, temperature=args.temperature)
                    values = values - args.reward_bias
                    policy = losses.policy_loss(logprobs, old, advantages, args.cliprange)
                    value = losses.value_loss(values, old_values, returns, args.cliprange_value)
                    loss = losses.ppo_loss(policy, value, args.vf_coef, num_tokens) * args.world_size
                self.accelerator.backward(loss)
            total += loss.detach()
            sums += update_sums(logprobs.detach(), old, policy.detach(), values.detach(), old_values, value.detach(), args)
        self.stats["update"].append(sums / num_tokens)
        return total

    def pretraining_gradients(self, model: nn.Module) -> None:
        """Back-propagate ptx_coef times the language-modelling loss of the next pretraining examples (eq. 2)."""
        args = self.args
        count = round(args.ptx_ratio * args.batch_size / args.num_mini_batches)
        numbers = self.ptx_order.rows(self.state.global_step * count, count)
        context = getattr(self.model.policy.config, "max_position_embeddings", None)
        examples = [row["input_ids"][:context] for row in fetch(self.ptx_dataset, numbers)]
        num_tokens = sum(len(example) - 1 for example in examples)
        denominator = num_tokens if args.ptx_normalization == "token_mean" else count
        own, total = examples[args.process_index :: args.world_size], 0.0
        # The last PPO micro-batch synchronises both gradients over the processes.
        with self.accelerator.no_sync(model):
            for batch in rollout.length_batches([len(example) for example in own], args.max_tokens):
                inputs = self.padded([own[index] for index in batch], [1] * len(batch))
                with self.compute_loss_context_manager():
                    logprobs, _ = model(*inputs, temperature=1.0, values=False)
                    loss = losses.ptx_loss(logprobs, denominator) * args.world_size
                self.accelerator.backward(args.ptx_coef * loss)
                total += loss.detach()
        self.stats["loss/ptx"].append(total)

    def padded(self, sequences: list[list[int]], prompt_lengths: list[int]) -> tuple[Tensor, Tensor]:
        """input_ids [b, T], padded on the right, and predicts [b, T]."""
        device = self.args.device
        ids = rollout.pad_right(sequences, self.pad_id, device)
        return ids, rollout.predicting_positions(sequences, prompt_lengths, device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic each by itself: a surprised critic must not shrink the policy's step."""
        policy = clip_grad_norm_(self.model.policy.parameters(), self.args.max_grad_norm)
        critic = clip_grad_norm_(self.model.critic.parameters(), self.args.max_grad_norm)
        self.stats["grad_norm"].append(policy)
        self.stats["critic/grad_norm"].append(critic)
        return policy

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer with the policy's and the critic's own learning rates."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = []
            for name, lr in (("policy", self.args.learning_rate), ("critic", self.args.critic_learning_rate)):
                parameters = [(n, p) for n, p in self.model.named_parameters() if n.startswith(name) and p.requires_grad]
                for decay, weight_decay in ((True, self.args.weight_decay), (False, 0.0)):
                    group = [p for n, p in parameters if (n in decayed) == decay]
                    groups.append({"params": group, "lr": lr, "weight_decay": weight_decay})
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """From a tenth of the peak linearly to the peak over `warmup_iterations`, then constant (App. C.4)."""
        if self.lr_scheduler is None:
            warmup, steps = self.args.warmup_iterations, self.args.steps_per_iteration

            def factor(step: int) -> float:
                iteration = step // steps
                return 0.1 + 0.9 * iteration / warmup if iteration < warmup else 1.0

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # ---- log ----------------------------------------------------------------------------------------------------------

    def record_rollout(self, episodes: Episodes) -> None:
        """What an iteration's sampling says, means over all responses."""
        mask, penalty = episodes.mask, self.args.missing_eos_penalty * ~episodes.ended
        kl = losses.kl_k1(episodes.old_logprobs, episodes.ref_logprobs) * mask
        k3 = losses.kl_k3(episodes.old_logprobs, episodes.ref_logprobs) * mask
        returns, errors = episodes.returns[mask], (episodes.returns - episodes.values)[mask]
        non_score = -self.args.kl_coef * kl.sum(1)
        for name, value in {
            "objective/scores": episodes.scores.mean(),
            "objective/scores_std": episodes.scores.std(unbiased=False),
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_k3": k3.sum(1).mean(),
            "objective/non_score_reward": non_score.mean(),
            "objective/rlhf_reward": (non_score + episodes.scores - penalty).mean(),
            "objective/entropy": -(episodes.old_logprobs * mask).sum(1).mean(),
            "val/explained_var": 1 - errors.var(unbiased=False) / (returns.var(unbiased=False) + 1e-8),
            "val/num_eos_tokens": episodes.ended.sum(),
            "completions/mean_length": mask.sum(1).float().mean(),
        }.items():
            self.stats[name].append(value.item())

    def record_gradients(self, pretraining: list[Tensor | None]) -> None:
        """Norms of both gradients of the policy and the cosine between them; their ratio says what `ptx_coef` does."""
        total = [p.grad for p in self.model.policy.parameters()]
        pairs = [(part, whole) for part, whole in zip(pretraining, total, strict=True) if part is not None]
        if self.args.world_size > 1:
            pairs = [(self.accelerator.reduce(part, "mean"), whole) for part, whole in pairs]
        ptx = torch.stack(torch._foreach_norm([part for part, _ in pairs])).norm()
        difference = torch._foreach_sub([whole for _, whole in pairs], [part for part, _ in pairs])
        ppo = torch.stack(torch._foreach_norm(difference)).norm()
        dot = sum((part * rest).sum() for (part, _), rest in zip(pairs, difference, strict=True))
        self.stats["ppo/grad_norm"].append(ppo)
        self.stats["ptx/grad_norm"].append(ptx)
        self.stats["ptx/grad_ratio"].append(ptx / (ppo + 1e-12))
        self.stats["ptx/grad_cosine"].append(dot / (ptx * ppo + 1e-12))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Once an iteration: what sampling and updates recorded, under TRL 1.12's names where it has them."""
        if "loss" in logs and self.stats:
            update = self.accelerator.reduce(torch.stack(self.stats.pop("update")).mean(0), "sum").tolist()
            logs |= {name: value for name, value in zip(UPDATE_NAMES, update, strict=True)}
            for name, values in self.stats.items():
                total = sum(float(value) for value in values)
                logs[name] = total if name.startswith("seconds/") else total / len(values)
            logs["lr"] = logs.pop("learning_rate")
            logs["episode"] = self.state.global_step // self.args.steps_per_iteration * self.args.batch_size
            seconds = sum(value for name, value in logs.items() if name.startswith("seconds/"))
            logs["eps"] = self.args.batch_size / seconds
            self.stats.clear()
        self.state.epoch = self.state.global_step / self.args.max_steps
        super().log(logs, start_time)

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in `output_dir`, where AutoModelForCausalLM finds it; the critic beside it in `critic/`."""
        folder, actor_critic = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        actor_critic.policy.save_pretrained(folder)
        actor_critic.critic.save_pretrained(folder / "critic")
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for module, path in ((self.model.policy, folder), (self.model.critic, folder / "critic")):
            saved = type(module).from_pretrained(path, dtype=module.dtype, use_safetensors=True)
            module.load_state_dict(saved.state_dict())


# ---- helpers of the trainer -------------------------------------------------------------------------------------------

UPDATE_NAMES = (
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
)


@torch.no_grad()
def update_sums(logprobs, old, policy, values, old_values, value, args: PPOConfig) -> Tensor:
    """[6]: sums over the tokens of a micro-batch, in the order of UPDATE_NAMES."""
    ratio = torch.exp(logprobs - old)
    clipped = (-((ratio - 1).abs() > args.cliprange).float()).abs()
    value_clipped = ((values - old_values).abs() > args.cliprange_value).float()
    approx_kl = 0.5 * (logprobs - old) ** 2
    return torch.stack([each.sum() for each in (policy, value, approx_kl, clipped, value_clipped, ratio)])


def prompt_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(row["prompt_ids"]) if "prompt_ids" in row else tokenizer(row["prompt"])["input_ids"]


def fetch(dataset: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by number: all at once where the dataset can."""
    if hasattr(dataset, "__getitems__"):  # datasets.Dataset
        return dataset.__getitems__(list(numbers))
    return [dataset[number] for number in numbers]


def texts_of(trainer: PPOTrainer, ids: list[int]) -> str:
    return trainer.processing_class.decode(ids)


def gather(own: dict[str, list], processes: int) -> Episodes:
    """All processes' episodes in the order of their prompts, of which process p answered p, p + processes, ..."""
    shares = gather_object([own]) if processes > 1 else [own]
    every = {
        name: [item for group in zip(*(share[name] for share in shares), strict=True) for item in group] for name in own
    }
    lengths = torch.tensor([len(row) for row in every["old_logprobs"]])
    padded = {
        name: pad_sequence(every[name], batch_first=True) for name in ("old_logprobs", "ref_logprobs", "values")
    }
    return Episodes(
        sequences=every["sequences"],
        prompt_lengths=every["prompt_lengths"],
        mask=torch.arange(int(lengths.max()))[None] < lengths[:, None],
        scores=torch.tensor(every["scores"]),
        ended=torch.tensor(every["ended"]),
        **padded,
    )


def check(trainer: PPOTrainer, args: PPOConfig, policy, critic, prompts) -> None:
    """Refuse what cannot work, in one sentence, before training starts."""
    if trainer.eos_id is None:
        raise ValueError("the tokenizer has no EOS token, so no response could ever end: set tokenizer.eos_token")
    if trainer.pad_id is None or trainer.pad_id == trainer.eos_id:
        raise ValueError(
            "the tokenizer's pad token is missing or the same as EOS, which would hide every response's end: "
            "add one with tokenizer.add_special_tokens({'pad_token': '<|pad|>'}) and resize the models' embeddings"
        )
    if critic is None:
        raise ValueError("value_model is missing: load the reward model a second time and pass it")
    others = {id(p) for model in (policy, trainer.reward_model, trainer.ref_model) if model for p in model.parameters()}
    if any(id(p) in others for p in critic.parameters()):
        raise ValueError(
            "value_model shares its weights with another model (is it the reward model itself?): training it would change "
            "that one too; load the reward model a second time"
        )
    if trainer.ref_model is policy:
        raise ValueError("ref_model is the policy itself, so KL would always be 0: leave ref_model out, or load it twice")
    if trainer.reward_model is None and not trainer.reward_funcs:
        raise ValueError("nothing scores the responses: pass reward_model or reward_funcs")
    if len(prompts) == 0:
        raise ValueError("train_dataset has no prompts")
    if args.ptx_coef and not trainer.ptx_dataset:
        raise ValueError(f"ptx_coef={args.ptx_coef} needs pretraining examples: pass ptx_dataset, or set ptx_coef=0")
    for name, model in (("value_model", critic), ("reward_model", trainer.reward_model)):
        if model is None:
            continue
        if getattr(model, "score", None) is None or model.config.num_labels != 1:
            raise ValueError(f"{name} must be a sequence-classification model with one label and a `score` head")
        if model.get_input_embeddings().num_embeddings < policy.get_input_embeddings().num_embeddings:
            raise ValueError(f"{name} has a smaller vocabulary than the policy: they must share one tokenizer")
    context = getattr(policy.config, "max_position_embeddings", None)
    longest = max(len(prompt_ids(row, trainer.processing_class)) for row in prompts)
    if context is not None and longest + args.response_length > context:
        raise ValueError(
            f"a prompt of {longest} tokens and response_length={args.response_length} exceed the model's context of "
            f"{context}: drop such prompts or shorten the response"
        )
