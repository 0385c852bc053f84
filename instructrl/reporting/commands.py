"""The commands `report` and `compare`. Imports what it needs in function bodies."""

from typing import Annotated

import typer

from instructrl.options import complete

Run = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [KEY=VALUE]...",
        help="A recipe's name or file (default: tiny), the folder of an artifact of eval, or the beginning of its "
        "fingerprint; then values that replace the recipe's.",
        autocompletion=complete,
    ),
]
TwoRuns = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN RUN [KEY=VALUE]...",
        help="Two recipes, each with values of its own if you quote it ('tiny seed=1'), or folders or fingerprints "
        "of eval; then values that both get.",
        autocompletion=complete,
    ),
]


def add(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (report, compare):
        app.command()(command)


def report(
    words: Run = None,
    samples: Annotated[int | None, typer.Option(metavar="N", min=0, help="Prompts shown side by side.")] = None,
) -> None:
    """Write report.html and report.md anew, without evaluating."""
    from instructrl.reporting import document, runs

    one, overrides = runs.one(words or [])
    path = document.write(runs.find(one, overrides), document.SHOWN if samples is None else samples)
    typer.echo(f"The report: {path}")


def compare(words: TwoRuns) -> None:
    """Show two runs side by side: recipes and results."""
    from instructrl.printout import print_table
    from instructrl.reporting import comparison, runs

    named, overrides = runs.split(words)
    one, other = (runs.find(name, overrides) for name in runs.two(named))
    for table in comparison.tables(one, other):
        if table.rows:
            print_table(table.columns, table.rows, table.words)
        for note in table.notes:
            typer.echo(note.replace("`", ""))
    typer.echo(f"The comparison: {comparison.write(one, other)}")
