"""Arguments and options that several commands have, and their completion in a shell."""

from typing import Annotated

import typer

STAGES = {  # as in `pipeline.NAMES`; importing that would import pydantic, which takes longer than all of `--help`
    "data": "demonstrations, rankings, prompts and text",
    "pretrain": "a base model from scratch, where model.path is null",
    "sft": "the supervised policy",
    "label": "rankings of SFT's own answers, where data.world is set",
    "reward_model": "the reward model",
    "judge": "a second reward model, to compare answers in eval",
    "ppo_init": "the policy that PPO starts from, if not sft",
    "ppo": "the PPO policy",
    "ppo_ptx": "the PPO-ptx policy",
    "eval": "win rates, the alignment tax and the report",
}


def complete(incomplete: str) -> list[str]:
    """Shell completion of `recipe=NAME` and `key=`."""
    from instructrl.keys import every_key
    from instructrl.recipe_files import recipe_names

    choices = [f"recipe={name}" for name in recipe_names()] + [f"{key}=" for key in every_key()]
    return [choice for choice in choices if choice.startswith(incomplete)]


def complete_stage(incomplete: str) -> list[str]:
    """Shell completion of a stage's name."""
    return [name for name in STAGES if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[recipe=NAME] [KEY=VALUE]...",
        help="A shipped recipe or a .yaml file (default: tiny), then values that replace the recipe's.",
        autocompletion=complete,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show the plan and stop.")]
Force = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STAGE", help="Run this stage and everything downstream again.", autocompletion=complete_stage
    ),
]
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="Run every combination of KEY=A,B values.")]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Run so many independent stages side by side (runtime.jobs=N)."),
]
Slurm = Annotated[bool, typer.Option("--slurm", help="Submit a Slurm job a stage, and run nothing here.")]
Print = Annotated[bool, typer.Option("--print", help="With --slurm: print the scripts and submit nothing.")]
Only = Annotated[
    str | None,
    typer.Option(metavar="FINGERPRINT", help="Run this stage alone, if this is still its fingerprint."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
