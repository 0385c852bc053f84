"""PPO and PPO-ptx as in InstructGPT (arXiv 2203.02155, section 3.5 eq. 2, App. C.3 and C.4).

`PPOTrainer` reads as the paper's loop: sample and score episodes, shape rewards, estimate advantages; then for every
minibatch add the pretraining gradient and the PPO gradient, and step. The equations are in `losses.py`, sampling and
log-probabilities in `rollout.py` (by vLLM in `engine.py`), scores in `rewards.py`, episodes and minibatches in
`experience.py`, the coefficient of the KL penalty in `kl.py`, the weights' moving average in `ema.py`, settings in
`ppo_config.py`, and what is refused in `ppo_checks.py`. `docs/ppo.md` is the map.
"""

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from instructrl.trainers import completions, losses, rollout
from instructrl.trainers.actor_critic import ActorCritic, disable_dropout, freeze, load_weights, network
from instructrl.trainers.ema import EMA
from instructrl.trainers.experience import Episodes, Experience, MicroBatch, Passes, minibatches, seeded
from instructrl.trainers.gelu import fuse_gelu
from instructrl.trainers.kl import KLController
from instructrl.trainers.packing import Pack
from instructrl.trainers.ppo_checks import check_adapter, check_logits, check_models, check_prompts, check_tokenizer
from instructrl.trainers.ppo_config import PPOConfig
from instructrl.trainers.ppo_stats import (
    UPDATE_STATS,
    episode_stats,
    evaluation_stats,
    gradient_stats,
    policy_stats,
    value_stats,
)
from instructrl.trainers.prompts import Prompts, document_ids, fetch
from instructrl.trainers.rewards import RewardFunction, Rewards
from instructrl.trainers.sharded_trainer import ShardedTrainer
from instructrl.trainers.sharding import local, shard, unsharded, whole_weights

__all__ = ["PPOConfig", "PPOTrainer"]

STATE = "ppo_state.json"  # in a checkpoint: what changes and is no weight


class RolloutBoundary(TrainerCallback):
    """Puts saving and stopping off to the end of an iteration, where no half-used experience would have to be saved."""

    wishes = ("should_save", "should_training_stop")

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


class PPOTrainer(ShardedTrainer, Trainer):
    """Clipped PPO with a per-token KL penalty (`ptx_coef == 0`), and PPO-ptx, which adds the pretraining loss.

    Args:
        args: a `PPOConfig`.
        processing_class: the tokenizer of policy and critic. Its pad token must differ from EOS.
        model: the policy, a causal language model, or one with a PEFT adapter.
        train_dataset: prompts, as `Prompts` takes them; `reward_funcs` are given the further columns.
        value_model: the critic; in the paper a copy of the reward model (not the reward model itself).
        reward_model: a sequence-classification model with one label, read at a response's last token.
        reward_processing_class: its tokenizer, if that is another than the policy's.
        ref_model: what KL is measured from; by default a frozen copy of the policy as it is now, and of a policy with
            an adapter the model without it (where the adapter has already learnt, pass it a second time, frozen).
        reward_funcs: functions as in TRL (`rewards.py`). All scores add up.
        ptx_dataset: rows with `input_ids` or `text`, for `ptx_coef > 0`; cut at the model's context.
        eval_dataset: prompts for `evaluate`.
        peft_config: puts this adapter on the policy.
        plain_weights: for `use_vllm` and a policy with an adapter: the weights of the model that it merges to.

    Departures from the paper: values are clipped; a response that did not end loses `missing_eos_penalty`; both can be
    switched off. The padding token has probability 0, in every model. The models passed in lose their dropout, as they
    must while policies are compared.

    Departures from TRL 1.12: the score sits on EOS, not on the token after it; policy and critic have their own
    learning rates and are clipped, each by itself; a loss is a mean over a minibatch's tokens, so its split into
    micro-batches changes nothing; `objective/scores` is the score before the penalty.

    Raises:
        ValueError: something in these arguments cannot work. Nothing has been trained then.
        RolloutError: `use_vllm`, and vLLM is not there, or (while training) not the policy that it should be.
    """

    loss_is_scaled_for_ga = True  # every micro-batch is already divided by its minibatch's tokens

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        train_dataset: Sequence[dict[str, Any]],
        value_model: PreTrainedModel | PeftModel | None = None,
        reward_model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        reward_funcs: Sequence[RewardFunction] = (),
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        ptx_dataset: Sequence[dict[str, Any]] | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        peft_config: PeftConfig | None = None,
        plain_weights: Callable[[PeftModel], Mapping[str, Tensor]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
    ):
        check_tokenizer(processing_class)
        if reward_processing_class is not None:
            check_tokenizer(reward_processing_class, "reward model's tokenizer")
        check_models(model, value_model, ref_model, reward_model, processing_class, reward_processing_class)
        if reward_model is None and not reward_funcs:
            raise ValueError("nothing scores the responses: pass reward_model or reward_funcs")
        if args.ptx_coef and not ptx_dataset:
            raise ValueError(f"ptx_coef={args.ptx_coef} needs pretraining examples: pass ptx_dataset or set it to 0")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        check_adapter("model", model)
        check_adapter("value_model", value_model)
        if ref_model is None and not isinstance(model, PeftModel):
            ref_model = copy.deepcopy(model)
        for frozen in filter(None, (ref_model, reward_model)):
            freeze(frozen)
        for each in filter(None, (model, value_model, ref_model, reward_model)):
            disable_dropout(each)
            fuse_gelu(each)
        self.ref_model, self.reward_model = ref_model, reward_model  # no reference: the policy without its adapter
        self.readers = {"policy": model, "critic": value_model, "reference": ref_model}
        if reward_processing_class is None:  # one with its own tokenizer cuts what is too long for it
            self.readers["reward model"] = reward_model
        self.pad_id = processing_class.pad_token_id
        self.eos_id = processing_class.eos_token_id if args.stop_token_id is None else args.stop_token_id
        self.prompts = self.read_prompts(train_dataset, processing_class, args)
        self.eval_prompts = self.read_prompts(eval_dataset, processing_class, args) if eval_dataset else None
        check_logits(network(model), self.prompts.ids[0])
        for each in filter(None, (model, value_model, ref_model, reward_model)):
            if args.sharding != "none" and args.world_size > 1:
                shard(each, args.device, args.sharding)
            elif each in (ref_model, reward_model):  # Trainer moves what is trained
                each.to(args.device)
        self.prompt_order = Passes(len(self.prompts), args.seed, "prompts")
        self.ptx_dataset = ptx_dataset if args.ptx_coef else None
        self.ptx_order = Passes(len(ptx_dataset), args.seed, "ptx") if self.ptx_dataset else None
        tokenizers = {"tokenizer": processing_class, "reward_tokenizer": reward_processing_class}
        limits = {"bias": args.reward_bias, "max_tokens": args.max_tokens}
        self.rewards = Rewards(reward_model=reward_model, functions=list(reward_funcs), **tokenizers, **limits)
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.stats: dict[str, list[float | Tensor]] = defaultdict(list)  # since the last log line
        self.last_episodes: Episodes | None = None
        super().__init__(
            model=ActorCritic(model, value_model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.ema: EMA | None = None
        if args.ema_decay:
            self.ema = EMA(model, args.ema_decay, 1 if args.ema_every == "step" else args.steps_per_iteration)
            self.add_callback(self.ema)
        self.add_callback(RolloutBoundary)
        self.engine = self.start_engine(plain_weights) if args.use_vllm else None

    def start_engine(self, plain_weights):
        """vLLM, which takes seconds to import and to start."""
        from instructrl.trainers.engine import Engine

        args, sets = self.args, filter(None, (self.prompts, self.eval_prompts))
        longest = max(len(prompt) for prompts in sets for prompt in prompts.ids)
        return Engine(
            self.model.policy,
            self.accelerator,
            self.processing_class,
            args,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            max_length=args.vllm_max_model_length or longest + args.response_length,
            plain_weights=plain_weights,
        )

    def read_prompts(self, dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Prompts:
        prompts = Prompts(dataset, tokenizer)
        check_prompts(prompts.ids, args.response_length, self.readers)
        return prompts

    def train(self, *args, **kwargs):
        self.add_callback(self.pop_callback(RolloutBoundary))  # after all others, whose wishes it may put off
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Experience:
        return Experience(self.experience, self.args, first_step=lambda: self.state.global_step)

    @contextmanager
    def clock(self, phase: str):
        start = time.perf_counter()
        yield
        self.record({f"seconds/{phase}": time.perf_counter() - start})

    # ---- experience --------------------------------------------------------------------------------------------------

    def experience(self, iteration: int) -> Episodes:
        """Sample and score an iteration's episodes, each process its share, and estimate the advantages of all."""
        args = self.args
        numbers = self.prompt_order.rows(iteration * args.batch_size, args.batch_size)
        episodes = self.sample_and_score(self.prompts, numbers, "sampling", iteration)
        self.estimate_advantages(episodes)
        stats = episode_stats(episodes)
        self.record(stats)
        self.kl.update(float(stats["objective/kl"]), args.batch_size)
        self.show_completions(episodes, iteration)
        self.last_episodes = episodes
        return episodes

    def show_completions(self, episodes: Episodes, iteration: int) -> None:
        """Print and keep a table of what was sampled, every so many iterations and in the last one."""
        args = self.args
        every, last = args.completions_every, iteration == args.num_iterations - 1
        if args.should_save and every and (last or iteration % every == 0):
            rows = completions.completion_rows(episodes, self.processing_class, args.num_completions)
            folder = Path(args.completions_dir or Path(args.output_dir) / "completions")
            completions.write(rows, folder / f"{iteration:06d}.jsonl")
            completions.show(rows, f"iteration {iteration}")

    @torch.no_grad()
    def sample_and_score(self, source: Prompts, numbers: list[int], *stream: Any) -> Episodes:
        """Answer prompts by number, with the random numbers of a stream, each process its share; all get all."""
        args, actor_critic = self.args, self.accelerator.unwrap_model(self.model)
        policy, critic = network(actor_critic.policy), network(actor_critic.critic)
        # One number a token, whoever samples it: two processes answer as one would.
        uniforms = torch.rand(len(numbers), args.response_length, generator=seeded(args.seed, *stream))
        share = slice(args.process_index, None, args.world_size)
        most, numbers, uniforms = math.ceil(len(numbers) / args.world_size), numbers[share], uniforms[share]
        prompts = [list(source.ids[number]) for number in numbers]
        starts = [len(prompt) for prompt in prompts]
        actor_critic.eval()
        with self.clock("rollout"):
            if self.engine:
                answers = self.engine.answers(prompts, most, *stream)
            else:
                with unsharded(actor_critic.policy):
                    answers = self.answers(policy, prompts, uniforms)
        responses = [answer.ids for answer in answers]
        ended = [response[-1] == self.eos_id for response in responses]
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        batching = {"pad_token_id": self.pad_id, "max_tokens": args.max_tokens}
        with self.clock("scoring"), self.accelerator.autocast():
            old = [answer.logprobs for answer in answers]
            # There the sampler's differ from the update's, by up to 0.14 in bfloat16.
            if self.engine or args.bf16 or policy.dtype != torch.float32:
                with unsharded(actor_critic.policy):
                    old = rollout.score_logprobs(policy, sequences, starts, temperature=args.temperature, **batching)
            with self.reference() as reference:
                ref = rollout.score_logprobs(reference, sequences, starts, temperature=args.temperature, **batching)
            with unsharded(actor_critic.critic):
                values = rollout.score_values(critic, sequences, starts, **batching)
            with unsharded(self.reward_model) if self.reward_model is not None else nullcontext():
                scores = self.rewards(source.rows(numbers), prompts, responses, ended)
        own = {
            "sequences": sequences,
            "prompt_lengths": starts,
            "old_logprobs": old,
            "ref_logprobs": ref,
            # Shifted as the scores are, so that the critic, which starts as the reward model, starts on their scale.
            "values": [value - args.reward_bias for value in values],
            "scores": scores,
            "ended": ended,
        }
        if self.engine:
            own["sampler_logprobs"] = [answer.logprobs for answer in answers]
        episodes = Episodes.gather(own, args.world_size)
        if self.engine:
            self.record(self.engine.compared(episodes))
        return episodes

    def answers(self, policy: PreTrainedModel, prompts: list[list[int]], uniforms: Tensor) -> list[rollout.Completion]:
        """One response to each prompt, sampled by the policy itself."""
        args = self.args
        with self.accelerator.autocast():
            return rollout.generate(
                policy,
                prompts,
                max_new_tokens=args.response_length,
                temperature=args.temperature,
                eos_token_id=self.eos_id,
                pad_token_id=self.pad_id,
                uniforms=uniforms,
                batch_size=args.generation_batch_size,
                max_tokens=args.max_tokens,
            )

    @contextmanager
    def reference(self):
        """The reference model: a model of its own, or the policy with its adapter switched off."""
        if self.ref_model is not None:
            with unsharded(self.ref_model):
                yield network(self.ref_model)
            return
        policy = self.accelerator.unwrap_model(self.model).policy
        with unsharded(policy), policy.disable_adapter():
            yield network(policy)

    def estimate_advantages(self, episodes: Episodes) -> None:
        """Rewards (KL at every token, the score at the last), then advantages and returns, over the whole batch."""
        args, mask = self.args, episodes.mask
        estimate = losses.kl_k1 if args.kl_estimator == "k1" else losses.kl_k3
        episodes.kl, episodes.kl_coef = estimate(episodes.old_logprobs, episodes.ref_logprobs), self.kl.coef
        episodes.final_scores = episodes.scores - args.missing_eos_penalty * ~episodes.ended
        if args.missing_eos_score is not None:
            episodes.final_scores = torch.where(episodes.ended, episodes.scores, args.missing_eos_score)
        rewards = losses.shaped_rewards(episodes.final_scores, episodes.kl, mask, episodes.kl_coef)
        if args.whiten_rewards:
            rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
        advantages, episodes.returns = losses.gae(rewards, episodes.values, mask, args.gamma, args.lam)
        # Returns keep the advantages' own scale: the critic predicts rewards, not standard deviations.
        episodes.advantages = losses.masked_whiten(advantages, mask) if args.whiten_advantages else advantages

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer held-out prompts, all with the same random numbers every time, and log what the answers score.

        Names as in training behind `eval_`; behind `eval_ema_` what the policy's moving average does.
        """
        source = self.eval_prompts
        if eval_dataset is not None:
            source = self.read_prompts(eval_dataset, self.processing_class, self.args)
        if source is None:
            raise ValueError("there are no prompts to evaluate on: pass eval_dataset")
        metrics: dict[str, float] = {}
        variants = {metric_key_prefix: nullcontext()}
        if self.ema:
            variants[f"{metric_key_prefix}_ema"] = self.ema.applied()
        kept = self.stats  # evaluation leaves no trace in what the next iteration logs
        for prefix, weights in variants.items():
            self.stats = defaultdict(list)
            with weights:
                episodes = self.sample_and_score(source, list(range(len(source))), "evaluation")
            self.estimate_advantages(episodes)
            metrics |= {f"{prefix}_{name}": float(value) for name, value in evaluation_stats(episodes).items()}
        self.stats = kept
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- update ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Both gradients of one minibatch, accumulated into the same buffers for the one step that follows (App. C.4).

        A step of its own for pretraining would not do: Adam divides out a gradient's scale, and so `ptx_coef`.
        """
        model.train()
        pretraining: list[Tensor] = []
        if self.ptx_dataset:
            with self.clock("ptx"):
                self.pretraining_gradients(model)
                if not self.zero:  # DeepSpeed keeps gradients for itself
                    pretraining = [part.clone() for part in self.policy_gradients()]
        with self.clock("update"):
            loss = self.ppo_gradients(model, inputs["episodes"], inputs["rows"])
        if pretraining:
            if self.args.world_size > 1 and not self.sharded:
                pretraining = [self.accelerator.reduce(part, "mean") for part in pretraining]
            over_processes = self.accelerator.reduce if self.sharded else None
            self.record(gradient_stats(pretraining, self.policy_gradients(), over_processes))
        return loss

    def policy_gradients(self) -> list[Tensor]:
        """As they are now; of sharded weights this process's part."""
        return [local(p.grad) for p in self.model.policy.parameters() if p.grad is not None]

    def batches(self, lengths: Sequence[int], most: int | None = None) -> list[list[int]]:
        """This process's share of rows of those lengths in micro-batches, numbered within the share.

        Where all must keep step, they make as many passes as the one that has most: empty ones are added.
        """
        args, processes = self.args, self.args.world_size

        def of(process: int) -> list[list[int]]:
            return rollout.length_batches(lengths[process::processes], args.max_tokens, most)

        own = of(args.process_index)
        if not self.in_step:
            return own
        return own + [[]] * (max(len(of(process)) for process in range(processes)) - len(own))

    def ppo_gradients(self, model: nn.Module, episodes: Episodes, rows: list[int]) -> Tensor:
        """Back-propagate the clipped losses of a minibatch (this process's share) in micro-batches of like length.

        First all of the policy's, then all of the critic's: the activations of one network are in memory at a time.
        """
        args = self.args
        num_tokens = int(episodes.mask[rows].sum())  # of the minibatch over all processes
        own = rows[args.process_index :: args.world_size]
        batches = self.batches([len(episodes.sequences[row]) for row in rows], math.ceil(len(own) / args.micro_batches))
        micros = [self.micro_batch(episodes, [own[index] for index in batch or (0,)]) for batch in batches]
        total, stats = torch.zeros((), device=args.device), torch.zeros(len(UPDATE_STATS), device=args.device)

        def policy_losses(micro: MicroBatch) -> tuple[Tensor, Tensor]:
            logprobs = model("policy", micro.pack, args.temperature)
            clipped = losses.policy_loss(logprobs, micro.old_logprobs, micro.advantages, args.cliprange)
            return clipped, policy_stats(logprobs, micro.old_logprobs, micro.advantages, clipped)

        def value_losses(micro: MicroBatch) -> tuple[Tensor, Tensor]:
            values = model("critic", micro.pack) - args.reward_bias
            clipped = losses.value_loss(values, micro.values, micro.returns, args.cliprange_value)
            return args.vf_coef * clipped, value_stats(values, micro.returns, clipped)

        for token_losses in (policy_losses, value_losses):
            for number, (micro, batch) in enumerate(zip(micros, batches, strict=True)):
                # Gradients are averaged over processes, once, on the last backward pass; hence the factor.
                with self.accelerator.no_sync(model) if number < len(micros) - 1 else nullcontext():
                    with self.compute_loss_context_manager():
                        of_tokens, of_stats = token_losses(micro)
                        loss = of_tokens.sum() / num_tokens * args.world_size
                        if not batch:  # a pass that others need
                            loss, of_stats = loss * 0, of_stats * 0
                    self.accelerator.backward(loss)
                total += loss.detach()
                stats += of_stats
        self.record({"update": stats / num_tokens})
        return total

    def micro_batch(self, episodes: Episodes, rows: list[int]) -> MicroBatch:
        """Some episodes' tokens, row after row as the pack has them."""
        sequences, starts = [episodes.sequences[row] for row in rows], [episodes.prompt_lengths[row] for row in rows]
        mask = episodes.mask[rows]
        columns = (episodes.old_logprobs, episodes.advantages, episodes.values, episodes.returns)
        flat = (column[rows][mask].to(self.args.device) for column in columns)
        return MicroBatch(self.pack(sequences, starts), *flat)

    def pretraining_gradients(self, model: nn.Module) -> None:
        """Back-propagate `ptx_coef` times the language-modelling loss of the next pretraining examples (eq. 2)."""
        args, count = self.args, self.args.ptx_batch_size
        numbers = self.ptx_order.rows(self.state.global_step * count, count)
        context = getattr(network(self.model.policy).config, "max_position_embeddings", None)
        rows = fetch(self.ptx_dataset, numbers)
        examples = [document_ids(row, self.processing_class)[:context] for row in rows]
        num_tokens = sum(len(example) - 1 for example in examples)
        denominator = max(num_tokens, 1) if args.ptx_normalization == "token_mean" else count
        own, total = examples[args.process_index :: args.world_size], torch.zeros((), device=args.device)
        batches = self.batches([len(example) for example in examples])
        # All of them now: between passes a copy to a GPU would wait for it.
        packs = [self.pack([own[index] for index in batch or (0,)], [1] * max(len(batch), 1)) for batch in batches]
        # The PPO gradients' last backward pass averages these with its own; where weights are sharded, each pass does.
        with self.accelerator.no_sync(model):
            for pack, batch in zip(packs, batches, strict=True):
                with self.compute_loss_context_manager():
                    logprobs = model("policy", pack)
                    loss = losses.ptx_loss(logprobs, denominator) * args.world_size * bool(batch)
                self.accelerator.backward(args.ptx_coef * loss)
                total += loss.detach()
        self.record({"loss/ptx": total})

    def batch_rows(self, step: int) -> list[int]:
        """What an optimizer step (from 1) reads: prompts, and pretraining examples, numbered after all prompts."""
        args = self.args
        iteration, minibatch = divmod(step - 1, args.steps_per_iteration)
        epoch, number = divmod(minibatch, args.num_mini_batches)
        numbers = self.prompt_order.rows(iteration * args.batch_size, args.batch_size)
        prompts = [numbers[row] for row in minibatches(args, iteration, epoch)[number]]
        ptx = self.ptx_order.rows((step - 1) * args.ptx_batch_size, args.ptx_batch_size) if self.ptx_order else []
        return prompts + [len(self.prompts) + row for row in ptx]

    def pack(self, sequences: list[list[int]], prompt_lengths: list[int]) -> Pack:
        """The sequences, and in each the positions that predict what follows its first `prompt_lengths` tokens."""
        wanted = [rollout.predicting(ids, start) for ids, start in zip(sequences, prompt_lengths, strict=True)]
        return Pack.of(sequences, wanted, self.pad_id, self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic each by itself: a surprised critic must not shorten the policy's step."""
        policy, critic = self.clipped()
        self.record({"grad_norm": policy, "critic/grad_norm": critic})
        return torch.maximum(policy, critic)  # not finite if one of them is not

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer, in which policy and critic have their own learning rates."""
        if self.optimizer is not None:
            return self.optimizer
        args, groups = self.args, []
        kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        for prefix, learning_rate in (("policy.", args.learning_rate), ("critic.", args.critic_learning_rate)):
            trained = [(n, p) for n, p in self.model.named_parameters() if n.startswith(prefix) and p.requires_grad]
            for decay in (True, False):
                parameters = [p for name, p in trained if (name in decayed) == decay]
                if parameters:
                    weight_decay = args.weight_decay if decay else 0.0
                    groups.append({"params": parameters, "lr": learning_rate, "weight_decay": weight_decay})
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Learning rates rise from a tenth of the peak over the first `warmup_iterations`, then stay (App. C.4), or go
        down to `final_learning_rate_share`."""
        if self.lr_scheduler is None:
            args = self.args
            warmup, fall = args.warmup_iterations, 1 - args.final_learning_rate_share

            def factor(step: int) -> float:
                iteration = step // args.steps_per_iteration
                if iteration < warmup:
                    return 0.1 + 0.9 * iteration / warmup
                return 1 - fall * (iteration - warmup) / max(args.num_iterations - warmup, 1)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # ---- log ---------------------------------------------------------------------------------------------------------

    def record(self, stats: dict[str, Tensor | float]) -> None:
        """Keep for the next log line."""
        for name, value in stats.items():
            self.stats[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Once an iteration: means over its optimizer steps, and seconds, under TRL 1.12's names where it has them."""
        if self.stats and "learning_rate" in logs:  # not the summary at the end of training
            update = self.accelerator.reduce(torch.stack(self.stats.pop("update")).mean(0), "sum").tolist()
            if self.ptx_dataset:
                self.stats["loss/ptx"] = self.accelerator.reduce(torch.stack(self.stats["loss/ptx"]), "mean")
            means = {name: sum(map(float, values)) / len(values) for name, values in self.stats.items()}
            seconds = {name: sum(self.stats[name]) for name in means if name.startswith("seconds/")}
            iteration = self.state.global_step // self.args.steps_per_iteration
            logs["lr"] = logs.pop("learning_rate")
            logs |= dict(zip(UPDATE_STATS, update, strict=True)) | means | seconds
            logs |= {"episode": iteration * self.args.batch_size, "eps": self.args.batch_size / sum(seconds.values())}
            self.stats.clear()
        self.state.epoch = self.state.global_step / self.args.max_steps  # as if a resumed run had begun at the start
        super().log(logs, start_time)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy (or its adapter) in `output_dir`, where AutoModelForCausalLM finds it; the critic in `critic/`;
        the moving average's weights and beta beside them."""
        folder, actor_critic = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        if not self.args.should_save and not self.sharded:
            return
        for model, where in ((actor_critic.policy, folder), (actor_critic.critic, folder / "critic")):
            gathered = whole_weights(model)
            if self.args.should_save:
                model.save_pretrained(where, state_dict=gathered)
        if self.ema:
            self.ema.save(folder)
        if self.args.should_save:
            self.processing_class.save_pretrained(folder)
            (folder / STATE).write_text(json.dumps({"kl_coef": self.kl.coef}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.model.policy, folder)
        load_weights(self.model.critic, folder / "critic")
        if self.kl.target is not None:  # a fixed one is what the settings say now
            self.kl.coef = json.loads((folder / STATE).read_text())["kl_coef"]
        if self.ema:
            self.ema.load(folder)
