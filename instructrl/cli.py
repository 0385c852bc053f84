"""The command line: commands and options. Imports what it needs in function bodies, so that `--help` is quick."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from instructrl import __version__, housekeeping
from instructrl.errors import UserError
from instructrl.options import (
    STAGES,
    DryRun,
    Force,
    Jobs,
    Json,
    Multirun,
    Only,
    Overrides,
    Print,
    Slurm,
    complete_stage,
)
from instructrl.reporting import commands as reporting

SOMETHING_TO_RUN = 3  # the status of `plan --check`; 1 and 2 are errors

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="InstructGPT from one recipe: SFT, a reward model, PPO and PPO-ptx, and what alignment bought and cost.",
)


@app.command("run-all")
def run_all(
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = None,
    multirun: Multirun = False,
    jobs: Jobs = None,
    slurm: Slurm = False,
    scripts: Print = False,
) -> None:
    """Make all of it, up to the report on five models."""
    execute(None, overrides, dry_run, force, multirun, jobs, slurm, scripts)


@app.command()
def plan(
    overrides: Overrides = None,
    force: Force = None,
    multirun: Multirun = False,
    as_json: Json = False,
    as_mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 if anything would run.")] = False,
) -> None:
    """Show which stages run-all would run, and why."""
    from instructrl import printout
    from instructrl.jobs import make_jobs
    from instructrl.mermaid import flowchart

    if as_json and as_mermaid:
        raise UserError("--json and --mermaid are two forms of the same plan; choose one.")
    planned = make_jobs(None, overrides or [], force or [], multirun)
    if as_json:
        typer.echo(printout.plans_as_json(planned, multirun))
    elif as_mermaid:
        typer.echo(flowchart(planned))
    else:
        printout.show_plans(planned)
    if check and any(job.runs for job in planned):
        raise typer.Exit(SOMETHING_TO_RUN)


@app.command()
def estimate(
    overrides: Overrides = None,
    on: Annotated[
        str | None, typer.Option(metavar="HARDWARE", help="cpu, h100, a100-40gb, ...; default: what is here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, operations, hours and disk before a run."""
    from instructrl import estimate, hardware
    from instructrl.recipe import load_recipe
    from instructrl.shapes import shape

    recipe = load_recipe(overrides or [])
    machine = hardware.named(on, recipe) if on else hardware.here(recipe)
    found = estimate.estimate(recipe, shape(recipe, fetch=True), machine)
    if as_json:
        typer.echo(estimate.as_json(found))
    else:
        estimate.show(found)
    estimate.check(found)


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print the whole recipe, defaults included, as YAML."""
    from instructrl.printout import recipe_as_yaml
    from instructrl.recipe import load_recipe

    typer.echo(recipe_as_yaml(load_recipe(overrides or [])), nl=False)


@app.command()
def show(
    stage: Annotated[str, typer.Argument(metavar="STAGE", autocompletion=complete_stage)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show a stage's artifact, its origin and its metrics."""
    from instructrl import printout
    from instructrl.jobs import make_jobs, stage_name

    name = stage_name(stage)
    [job] = make_jobs(name, overrides or [], [], multirun=False)
    typer.echo(printout.artifact_as_json(job, name) if as_json else printout.artifact_as_text(job, name))


housekeeping.add(app)
reporting.add(app)


def stage_command(name: str) -> Callable[..., None]:
    """The command that makes one stage's artifact."""

    def command(
        overrides: Overrides = None,
        dry_run: DryRun = False,
        force: Force = None,
        multirun: Multirun = False,
        jobs: Jobs = None,
        slurm: Slurm = False,
        scripts: Print = False,
        only: Only = None,
    ) -> None:
        execute(name, overrides, dry_run, force, multirun, jobs, slurm, scripts, only)

    def data_command(
        overrides: Overrides = None,
        dry_run: DryRun = False,
        force: Force = None,
        multirun: Multirun = False,
        jobs: Jobs = None,
        slurm: Slurm = False,
        scripts: Print = False,
        only: Only = None,
        show: Annotated[
            int | None, typer.Option(metavar="N", min=1, help="Show N examples of each set as the model reads them.")
        ] = None,
    ) -> None:
        if show is None or dry_run:
            execute(name, overrides, dry_run, force, multirun, jobs, slurm, scripts, only)
        elif slurm:
            raise UserError("--show shows the data here; leave --slurm out.")
        else:
            show_data(overrides or [], force or [], multirun, show)

    return data_command if name == "data" else command


def show_data(overrides: list[str], force: list[str], multirun: bool, count: int) -> None:
    """Make the data unless it is there, and show examples of it."""
    from instructrl.jobs import make_jobs, run
    from instructrl.preview import show_examples
    from instructrl.printout import planned_stage

    if multirun:
        raise UserError("--show shows the data of one recipe; leave --multirun out.")
    [job] = make_jobs("data", overrides, force, multirun)
    if job.runs:
        run([job], ["instructrl", *sys.argv[1:]])
        [job] = make_jobs("data", overrides, [], multirun)
    artifact = planned_stage(job, "data").artifact
    assert artifact is not None
    show_examples(job.composition.recipe, artifact.path, count)


for stage_name_, makes in STAGES.items():
    app.command(stage_name_.replace("_", "-"), help=f"Make {makes}.")(stage_command(stage_name_))


def execute(
    target: str | None,
    overrides: list[str] | None,
    dry_run: bool,
    force: list[str] | None,
    multirun: bool,
    jobs: int | None,
    slurm: bool = False,
    scripts: bool = False,
    only: str | None = None,
) -> None:
    """Plan, and unless it is a dry run, run or submit. `target` None is the recipe's last stage."""
    from instructrl import printout
    from instructrl.jobs import check_alone, make_jobs, run

    if scripts and not slurm:
        raise UserError("--print shows the scripts that --slurm submits; add --slurm.")
    if only and (slurm or multirun):
        raise UserError("--only runs one stage of one recipe here; leave --slurm and --multirun out.")
    arguments = [*(overrides or []), *([f"runtime.jobs={jobs}"] if jobs else [])]
    planned = make_jobs(target, arguments, force or [], multirun)
    if only:
        check_alone(planned[0], only)
    if dry_run:
        printout.show_plans(planned)
    elif slurm:
        from instructrl.slurm import show_scripts, submit

        show_scripts(planned) if scripts else submit(planned)
    else:
        run(planned, ["instructrl", *sys.argv[1:]], noted=bool(only))


def print_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        typer.echo(f"instructrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line. The only place that turns an error into a message and an exit status."""
    try:
        app()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `instructrl config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails too
        sys.exit(1)
    except OSError as error:
        from instructrl.failure import writing

        print(f"Error: {writing(error)}", file=sys.stderr)
        sys.exit(1)
