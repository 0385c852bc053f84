"""The pipeline: which stages a recipe has, what each reads from it, and what each builds on."""

from collections.abc import Iterable
from dataclasses import dataclass

from instructrl.config import Recipe


@dataclass(frozen=True)
class Stage:
    """One node of the pipeline. `name` is its command, its folder of artifacts and its section of the recipe."""

    name: str
    reads: tuple[str, ...]  # sections of the recipe that change what it computes
    needs: tuple[str, ...] = ()  # stages whose artifacts it loads
    version: int = 1  # raise it when the code computes something else for the same recipe
    module: str = ""  # in `instructrl/stages/`; empty: the stage's own name
    makes: str = ""  # one line for `--help`
    distributed: bool = False  # shares its work among `runtime.num_processes`; else it is one process


NAMES = ("data", "pretrain", "sft", "label", "reward_model", "judge", "ppo_init", "ppo", "ppo_ptx", "eval")
LAST = "eval"  # what `run-all` makes; a deleted intermediate artifact is built again only if something needs it


def stages(recipe: Recipe) -> dict[str, Stage]:
    """The recipe's stages, upstream first. A recipe with its own base model has no `pretrain`, one with its own
    rankings no `label`, one whose judge is not learnt no `judge`, one whose policies start from `sft` no `ppo_init`."""
    base = ("pretrain",) if recipe.model.path is None else ()
    ranked = ("label",) if recipe.data.world else ()
    judge = ("judge",) if recipe.eval.judge == "reward_model" else ()
    init = ("ppo_init",) if "ppo_init" in (recipe.ppo.init, recipe.ppo_ptx.init) else ()
    adapted = base if recipe.model.lora else ()  # adapters are of the base model
    # Their artifacts hold the adapter too, and later stages go on from it.
    trained = 3 if recipe.model.lora else 2
    lengths = ("model",) if recipe.model.path and not recipe.data.world else ()  # of prompts, in its tokens
    every = (
        Stage("data", reads=("data", "seed", *lengths), version=2, makes="demonstrations, rankings, prompts and text"),
        Stage("pretrain", reads=("model", "pretrain", "seed"), needs=("data",), makes="a base model from scratch"),
        Stage(
            "sft",
            reads=("model", "sft", "seed"),
            needs=("data", *base),
            version=trained,
            makes="the supervised policy",
            distributed=True,
        ),
        Stage("label", reads=("label", "seed"), needs=("data", "sft"), makes="rankings of the SFT model's own answers"),
        Stage(
            "reward_model",
            reads=("reward_model", "seed"),
            needs=("data", *adapted, "sft", *ranked),
            version=trained,
            makes="the reward model",
            distributed=True,
        ),
        Stage(
            "judge",
            reads=("reward_model", "seed"),
            needs=("data", *adapted, "sft"),
            version=trained,
            module="reward_model",
            makes="a reward model for eval, from rankings held out for it",
            distributed=True,
        ),
        Stage(
            "ppo_init",
            reads=("model", "ppo_init", "seed"),
            needs=("data", *base),
            version=trained,
            makes="the policy that PPO starts from",
            distributed=True,
        ),
        Stage(
            "ppo",
            reads=("ppo", "seed"),
            needs=("data", *adapted, recipe.ppo.init, "reward_model"),
            version=trained,
            makes="the PPO policy",
            distributed=True,
        ),
        Stage(
            "ppo_ptx",
            reads=("ppo_ptx", "seed"),
            needs=("data", *adapted, recipe.ppo_ptx.init, "reward_model"),
            version=trained,
            module="ppo",
            makes="the PPO-ptx policy",
            distributed=True,
        ),
        Stage(
            "eval",
            reads=("model", "eval", "seed"),
            needs=("data", *base, "sft", *ranked, "reward_model", *judge, "ppo", "ppo_ptx"),
            version=4,
            makes="win rates, the alignment tax and the report",
            distributed=True,
        ),
    )
    left_out = {"pretrain", "label", "judge", "ppo_init"} - {*base, *ranked, *judge, *init}
    return {stage.name: stage for stage in every if stage.name not in left_out}


def ordered(pipeline: dict[str, Stage], targets: Iterable[str]) -> list[Stage]:
    """The targets and everything they need, upstream first, as the pipeline is."""
    wanted = set(targets)
    for name in reversed(pipeline):
        if name in wanted:
            wanted.update(pipeline[name].needs)
    return [stage for name, stage in pipeline.items() if name in wanted]


def downstream(pipeline: dict[str, Stage], names: Iterable[str]) -> set[str]:
    """The names and every stage that builds on them."""
    reached = set(names)
    for stage in ordered(pipeline, pipeline):
        if reached.intersection(stage.needs):
            reached.add(stage.name)
    return reached
