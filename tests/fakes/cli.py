"""`python -m fakes.cli`: the real command line on a pipeline of fake stages."""

from dataclasses import replace

from instructrl import cli, jobs, pipeline
from instructrl.config import Recipe
from instructrl.pipeline import Stage

KEPT = ("data", "sft", "ppo", "ppo_ptx", "eval")


def stages(recipe: Recipe) -> dict[str, Stage]:
    """The recipe's pipeline, shortened, with the fake as every stage's module."""
    kept = {name: stage for name, stage in pipeline.stages(recipe).items() if name in KEPT}
    return {
        name: replace(stage, module="fakes.stage", needs=tuple(need for need in stage.needs if need in KEPT))
        for name, stage in kept.items()
    }


if __name__ == "__main__":
    jobs.stages = stages
    cli.main()
