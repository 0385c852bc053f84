"""The same iteration of PPO twice, by our trainer and by TRL 1.12's: same weights, prompts, tokens and minibatches.

TRL's `train` is one function, so it is watched and corrected from outside: its random draws return what ours drew, a
probe reads its local variables, and a correction replaces one line of its source by another.
"""

import copy
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import tiny_models as tiny
import torch
import trl.experimental.ppo.ppo_trainer as theirs
from torch import nn

from instructrl.config import PPO, Data, Eval, Model, Recipe, Runtime, World
from instructrl.stages import ppo, trl_ppo
from instructrl.trainers import losses
from instructrl.trainers.experience import seeded
from instructrl.trainers.ppo import PPOTrainer
from instructrl.trainers.ppo_config import PPOConfig

EPISODES, TOKENS, BIAS = 16, 8, 0.3
SETTINGS = {
    "total_episodes": EPISODES,
    "batch_size": EPISODES,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "response_length": TOKENS,
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "warmup_iterations": 0,
    "kl_coef": 0.2,
    "gamma": 0.95,
    "lam": 0.9,
    "vf_coef": 0.5,
    "temperature": 0.7,
    "missing_eos_penalty": 1.5,
    "max_grad_norm": 0.5,
}
EXPERIENCE = ("log-probs", "reference log-probs", "values", "scores", "rewards", "advantages", "returns")
WEIGHTS = ("policy weights", "critic weights")
CORRECTIONS = {  # what TRL does otherwise than we -> lines of its `train`, and what makes them ours
    "score after EOS": {"sequence_lengths_p1 = sequence_lengths + 1": "sequence_lengths_p1 = sequence_lengths"},
    "sample variance": {
        "= masked_whiten(rewards,": "= biased_whiten(rewards,",
        "= masked_whiten(advantages,": "= biased_whiten(advantages,",
    },
    "statistics of padding": {
        "0.5 * (logprobs_diff**2).mean()": "0.5 * masked_mean(logprobs_diff**2, ~padding_mask[micro_batch_inds])",
        "= ratio.mean()": "= masked_mean(ratio, ~padding_mask[micro_batch_inds])",
    },
}


class Twins:
    """One iteration by both trainers.

    Args:
        architecture: gpt2 or llama.
        ending: whether responses may end before the limit.
        corrections: names in CORRECTIONS to apply to TRL.
        patches: (object, attribute, value) to set while TRL trains, for a difference that is not in its source.
        settings: keys of the recipe's section.
    """

    def __init__(
        self,
        folder,
        architecture: str,
        *,
        ending: bool = True,
        corrections: Iterable[str] = CORRECTIONS,
        patches: Iterable[tuple] = (),
        max_tokens: int = 4096,
        **settings,
    ):
        section = PPO(backend="trl", **SETTINGS | settings)
        self.recipe = Recipe(
            data=Data(world=World(), max_prompt_tokens=16),
            eval=Eval(judge="gold"),
            model=Model(path=None),
            ppo=section,
            runtime=Runtime(threads=1, device="cpu", max_tokens=max_tokens),
        )
        self.section, self.folder, self.patches = section, folder, list(patches)
        self.prompts = [{"prompt_ids": ids} for ids in tiny.sequences(EPISODES, 3, 12)]
        self.corrected = corrected_train(corrections)
        self.models = {
            "policy": tiny.policy(architecture),
            "critic": tiny.reward_model(architecture),
            "reward_model": tiny.reward_model(architecture, seed=2),
        }
        self.reference = tiny.policy(architecture, seed=3)
        for each in (self.models["policy"], self.reference):
            bias_head(each, eos=2.0 if ending else -1e4)
        self.ours, self.trls = Side(), Side()
        self.rows: list[int] = []  # our row of each of TRL's
        self.optimizer_steps = 0  # TRL's
        self.run_ours()
        self.run_trl()

    def run_ours(self) -> None:
        models = copy.deepcopy(self.models)
        trainer = PPOTrainer(
            args=ppo.arguments(self.recipe, self.section, BIAS, self.folder / "ours"),
            processing_class=tiny.tokenizer(),
            model=models["policy"],
            value_model=models["critic"],
            reward_model=models["reward_model"],
            ref_model=copy.deepcopy(self.reference),
            train_dataset=self.prompts,
        )
        trainer.train()
        episodes, args = trainer.last_episodes, trainer.args
        self.episodes, self.mask = episodes, episodes.mask
        rewards = losses.shaped_rewards(episodes.final_scores, episodes.kl, episodes.mask, episodes.kl_coef)
        if args.whiten_rewards:
            rewards = losses.masked_whiten(rewards, episodes.mask, shift_mean=False)
        self.ours.tensors = {
            "log-probs": episodes.old_logprobs,
            "reference log-probs": episodes.ref_logprobs,
            "values": episodes.values,
            "scores": episodes.final_scores,
            "rewards": rewards,
            "advantages": episodes.advantages,
            "returns": episodes.returns,
        }
        self.ours.log = next(line for line in trainer.state.log_history if "objective/kl" in line)
        self.ours.weights(models)
        self.order = minibatches(args)

    def run_trl(self) -> None:
        models = copy.deepcopy(self.models)
        with ExitStack() as stack:
            replace = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
            replace(trl_ppo, "make_trainer", self.with_reference(trl_ppo.make_trainer))
            replace(theirs.PPOTrainer, "train", self.corrected)
            replace(theirs, "generate", self.forced(theirs.generate))
            replace(theirs, "np", SimpleNamespace(random=SimpleNamespace(permutation=self.permutation)))
            replace(theirs, "empty_cache", self.probe)
            for patch in self.patches:
                replace(*patch)
            folder = self.folder / "trl"
            folder.mkdir(exist_ok=True)
            log = trl_ppo.train(
                "ppo", self.recipe, folder, tiny.tokenizer(), reward_bias=BIAS, prompts=self.prompts, **models
            )
        self.trls.log = {key.removeprefix("trl/"): value for key, value in log[0].items()}
        self.trls.weights(models)

    def with_reference(self, make_trainer):
        """TRL's trainer with another reference than the policy, or KL would be 0; its optimizer steps are counted."""

        def made(*args, **options):
            trainer = make_trainer(*args, **options)
            trainer.ref_model = copy.deepcopy(self.reference)

            def count(*_):
                self.optimizer_steps += 1

            trainer.optimizer.optimizer.register_step_post_hook(count)
            return trainer

        return made

    def forced(self, generate):
        """TRL's own generation, but the tokens it draws are those that our sampler drew."""

        def drawn(policy, queries, *args):
            ours = {tuple(prompt): row for row, prompt in enumerate(self.episodes.prompts)}
            rows = [ours[tuple(ids[ids != tiny.PAD].tolist())] for ids in queries]
            self.rows += rows
            responses = [self.episodes.responses[row] for row in rows]
            tokens = torch.tensor([ids + [tiny.PAD] * (TOKENS - len(ids)) for ids in responses])
            draws = list(tokens.T[:, :, None])  # one [B, 1] a step
            with mock.patch.object(torch, "multinomial", side_effect=draws):
                return generate(policy, queries, *args)

        return drawn

    def permutation(self, size: int):
        """TRL's row numbers in the order in which our trainer took the same episodes."""
        theirs_of = {row: number for number, row in enumerate(self.rows)}
        return torch.tensor([theirs_of[row] for row in next(self.order)]).numpy()

    def probe(self) -> None:
        """What `train` holds when it has estimated advantages, its first call with them."""
        found = sys._getframe(1).f_locals
        if "advantages" not in found or self.trls.tensors:
            return
        back = torch.tensor([self.rows.index(row) for row in range(EPISODES)])
        names = {"log-probs": "logprobs", "reference log-probs": "ref_logprobs"}
        self.trls.tensors = {name: found[names.get(name, name)][back].clone() for name in EXPERIENCE}

    def moved(self) -> list[float]:
        """By how much our training changed a weight at most: of the policy, of the critic."""
        before = Side()
        before.weights(self.models)
        return [largest(before.tensors[name], self.ours.tensors[name]) for name in WEIGHTS]

    # ---- comparison --------------------------------------------------------------------------------------------------

    def difference(self, name: str) -> tuple[float, float, float]:
        """(ours, TRL's, largest difference): of tensors over real tokens, where the first two are means; of a number
        of the log; of weights, where they are the root mean square."""
        if name in self.ours.log:
            ours, trls = self.ours.log[name], self.trls.log[name]
            return ours, trls, abs(ours - trls)
        ours, trls = self.ours.tensors[name], self.trls.tensors[name]
        if name.endswith("weights"):
            return ours.square().mean().sqrt().item(), trls.square().mean().sqrt().item(), largest(ours, trls)
        if ours.ndim == 2:
            ours, trls = ours[self.mask], trls[self.mask]
        return ours.mean().item(), trls.mean().item(), largest(ours, trls)


class Side:
    """What one trainer computed: tensors [B, R] or [B] in the order of our rows, and its log line."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.log: dict[str, float] = {}

    def weights(self, models: dict[str, nn.Module]) -> None:
        for name in ("policy", "critic"):
            self.tensors[f"{name} weights"] = torch.cat(
                [p.detach().flatten() for p in models[name].parameters() if p.requires_grad]
            )


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def bias_head(policy, eos: float) -> None:
    """Give the head a bias, so that EOS is as likely as wanted."""
    head = nn.Linear(*reversed(policy.get_output_embeddings().weight.shape))
    head.weight = policy.get_output_embeddings().weight
    head.bias.requires_grad_(False).zero_()[tiny.EOS] = eos
    policy.set_output_embeddings(head)


def minibatches(args: PPOConfig):
    """The order of episodes in each of our trainer's epochs."""
    for epoch in range(args.num_ppo_epochs):
        yield torch.randperm(args.batch_size, generator=seeded(args.seed, "minibatches", 0, epoch)).tolist()


@functools.cache
def source() -> str:
    return textwrap.dedent(inspect.getsource(theirs.PPOTrainer.train))


def corrected_train(corrections: Iterable[str]):
    """TRL's `train` with some of its lines replaced."""
    text = source()
    for name in corrections:
        for line, ours in CORRECTIONS[name].items():
            assert text.count(line) == 1, f"TRL's train no longer has {line!r}"
            text = text.replace(line, ours)
    found: dict = {}
    vars(theirs)["biased_whiten"] = losses.masked_whiten
    exec(compile(text, theirs.__file__, "exec"), vars(theirs), found)
    return found["train"]
