"""The commands on what has been made: runs, diff, verify, logs and clean. Imports what it needs in function bodies."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from instructrl.options import Json, Overrides

if TYPE_CHECKING:
    from instructrl.artifacts import Store


def add(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (runs, clean):
        app.command()(command)


def runs(overrides: Overrides = None, as_json: Json = False) -> None:
    """List what has been made: how large, by which recipe, when."""
    from instructrl import inventory

    entries = inventory.entries(store_of(overrides))
    if as_json:
        typer.echo(inventory.as_json(entries))
    else:
        inventory.show(entries)


def clean(
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what no last run refers to; with --yes, delete it."""
    from instructrl import inventory

    command = shlex.join(["instructrl", "clean", *(overrides or []), "--yes"])
    inventory.clean(store_of(overrides), yes, command)


def store_of(overrides: list[str] | None) -> "Store":
    """The store that the recipe writes to."""
    from pathlib import Path

    from instructrl.artifacts import Store
    from instructrl.recipe import load_recipe

    return Store(Path(load_recipe(overrides or []).runtime.output_dir).expanduser())
