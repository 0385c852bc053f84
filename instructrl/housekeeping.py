"""The commands on what has been made: runs, diff, verify, logs and clean. Imports what it needs in function bodies."""

import shlex
from typing import Annotated

import typer

from instructrl.options import Json, Overrides, complete_stage

WHAT = "A stage of the recipe, a fingerprint as runs lists it, or an artifact's folder."
What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE] [recipe=NAME] [KEY=VALUE]...",
        help=f"{WHAT} None: all stages of the recipe.",
        autocompletion=complete_stage,
    ),
]


def add(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (runs, diff, verify, logs, clean):
        app.command()(command)


def runs(overrides: Overrides = None, as_json: Json = False) -> None:
    """List what has been made: how large, by which recipe, when."""
    from instructrl import inventory
    from instructrl.find import store_of

    entries = inventory.entries(store_of(overrides))
    if as_json:
        typer.echo(inventory.as_json(entries))
    else:
        inventory.show(entries)


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A recipe ('tiny seed=1'), a fingerprint or a folder.")],
    other: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of both.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show settings and metrics of two recipes side by side."""
    from instructrl import comparison

    sides = comparison.compare(one, other, overrides or [])
    if as_json:
        typer.echo(comparison.as_json(*sides))
    else:
        comparison.show(*sides)


def verify(what: What = None) -> None:
    """Hash an artifact's files again, and say which changed."""
    from instructrl.find import find, places, split
    from instructrl.jobs import make_jobs
    from instructrl.verification import show

    name, overrides = split(what)
    found = [find(name, overrides)] if name else places(make_jobs(None, overrides, [], multirun=False)[0])
    if not show(found, named=bool(name)):
        raise typer.Exit(1)


def logs(
    what: Annotated[str, typer.Argument(metavar="STAGE", help=WHAT, autocompletion=complete_stage)],
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what comes, until the stage ends.")] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", metavar="N", min=0, help="Print the last N lines only.")
    ] = None,
) -> None:
    """Print a stage's log."""
    from instructrl.find import find
    from instructrl.logs import show_log

    show_log(find(what, overrides or []), follow, lines)


def clean(
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what no last run refers to; with --yes, delete it."""
    from instructrl import inventory
    from instructrl.find import store_of

    command = shlex.join(["instructrl", "clean", *(overrides or []), "--yes"])
    inventory.clean(store_of(overrides), yes, command)
