"""`report.md` of a run: what eval says of its numbers, and the charts, the training and the recipe around it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from instructrl.reporting import samples, sections
from instructrl.reporting.drawing import Chart
from instructrl.reporting.runs import Run
from instructrl.reporting.tables import Table
from instructrl.stages import report
from instructrl.stages.markup import cell, code, fenced, grid

AFTER = {  # heading of eval's report -> the chart under it
    "## Win rates": "win_rates",
    "## Win rates by use case": "use_cases",
    "## The alignment tax: public tasks": "tax_tasks",
    "## The alignment tax: held-out text": "tax_text_loss",
}
ALONE = ("training", "before")  # sections that eval's report does not have
LATER = ("harness", "overoptimisation")  # charts whose headings other modules choose


def render(run: Run, metrics: Mapping[str, Any], found: Sequence[sections.Section], given: Sequence[dict]) -> str:
    """The whole file. `given` are the samples of the page, of which the recipe's number is shown."""
    drawn = {chart.name: chart for section in found for chart in section.charts}
    count = run.recipe.get("eval", {}).get("samples_shown", 8)
    parts = [evaluated(metrics, given[:count], drawn) if "prefix" in metrics else f"# {cell(run.name)}: report"]
    if run.missing:
        lines = [
            f"- {part.stage}: {cell(sections.state(part))}. {command(part.command)}".rstrip() for part in run.missing
        ]
        parts += ["## What is missing", "\n".join(lines)]
    parts += [image(drawn[name]) for name in LATER if name in drawn]
    for section in found:
        if section.name in ALONE:
            parts += [f"## {section.title}", *map(cell, section.texts), *map(image, section.charts)]
    parts += ["## Stages", markdown_table(sections.stages(run))]
    known = ", ".join(f"{name} {version}" for name, version in sections.versions(run).items())
    parts += [cell(known)] if known else []
    unmeasured = sections.unmeasured(metrics)
    if unmeasured:
        parts.append(f"Not measured in this run: {'; '.join(unmeasured)}.")
    parts += ["## The recipe", fenced(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True).rstrip())]
    return "\n\n".join(parts) + "\n"


def evaluated(metrics: Mapping[str, Any], given: Sequence[dict], drawn: Mapping[str, Chart]) -> str:
    """What eval wrote, with its charts. A model's text is in code blocks, indented: no line of it is a heading."""
    written = report.markdown(dict(metrics), samples.for_markdown(given))
    return "\n".join(with_charts(written.splitlines(), drawn))


def with_charts(lines: Iterable[str], drawn: Mapping[str, Chart]) -> Iterator[str]:
    for line in lines:
        yield line
        name = AFTER.get(line, "")
        if name in drawn:
            yield f"\n{image(drawn[name])}"


def image(chart: Chart) -> str:
    return f"![{cell(chart.caption)}](charts/{chart.name}.svg)"


def command(text: str) -> str:
    return f"Make it with `{code(text)}`." if text else ""


def markdown_table(table: Table) -> str:
    return grid(table.columns, table.rows)
