"""The sections of the page, in their order: what each says, its charts and tables, or what it would need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instructrl.display import duration
from instructrl.reporting import panels, tables
from instructrl.reporting.drawing import Chart
from instructrl.reporting.runs import Part, Run
from instructrl.reporting.tables import Table
from instructrl.stages import judges, report
from instructrl.stages import overoptimisation as overopt

Metrics = Mapping[str, Any]
NEEDS_EVAL = "This needs eval, which is not made."
OPTIONAL = {  # key of metrics.json -> what it would show
    "matrix": "win rates of any model against any other",
    "judge_card": "the judge's own card (position bias, refusals, cost)",
    "likert": "ratings from 1 to 7",
    "metadata": "the paper's Table 3 metadata",
    "harness": "public NLP tasks",
    "overoptimisation": "over-optimisation along the checkpoints",
    "scorecard": "the paper's numbers beside this run's",
}


@dataclass(frozen=True)
class Section:
    """One heading and what is under it."""

    name: str
    title: str
    texts: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()  # how to read it, at the end
    small: bool = False  # its charts are panels, three beside each other

    @property
    def empty(self) -> bool:
        """Whether there is nothing to look at."""
        return not (self.charts or self.tables)


@dataclass(frozen=True)
class Charts:
    """What was drawn, by name."""

    drawn: dict[str, Chart] = field(default_factory=dict)

    def named(self, *names: str) -> list[Chart]:
        """Those of these names that there are."""
        return [self.drawn[name] for name in names if name in self.drawn]


def every(run: Run, metrics: Metrics, drawn: Sequence[Chart]) -> list[Section]:
    """All sections but the samples and how it was made. One that is empty says why, or is left out."""
    of = Charts({chart.name: chart for chart in drawn})
    return [
        win_rates(metrics, of),
        *shown(preferences(metrics)),
        *shown(paper(metrics)),
        tax(metrics, of),
        *shown(harness(metrics, of)),
        training(run),
        *shown(before(run)),
        *shown(overoptimisation(metrics, of)),
        *shown(reward_model(metrics)),
    ]


def shown(section: Section) -> list[Section]:
    """Nothing for a section that was not measured: the end of the page lists those."""
    return [] if section.empty else [section]


def win_rates(metrics: Metrics, of: Charts) -> Section:
    notes = report.win_rate_notes(dict(metrics)).split("\n\n") if "prefix" in metrics else []
    found = [tables.made(metrics.get("table")), tables.made(metrics.get("use_case_table"), "By use case")]
    found.insert(1, tables.length_controlled(metrics))
    texts = [] if metrics else [NEEDS_EVAL]
    return Section("win-rates", "Win rates", texts, of.named("win_rates", "use_cases"), tables.kept(found), notes)


def preferences(metrics: Metrics) -> Section:
    found = [
        tables.matrix(metrics),
        tables.judge_card(metrics),
        tables.ratings(metrics),
        tables.gold(metrics),
    ]
    return Section("judge", "The judge and what it sees", judges.section(dict(metrics))[1:], tables=tables.kept(found))


def paper(metrics: Metrics) -> Section:
    found = [tables.scorecard(metrics), tables.claims(metrics)]
    return Section("paper", "The paper's claims", tables=tables.kept(found))


def tax(metrics: Metrics, of: Charts) -> Section:
    found = tables.tax(metrics, "tasks", "tasks_average", "Public tasks: accuracy")
    found += tables.tax(metrics, "text_loss", "text_loss_all", "Held-out text: loss in nats a token; lower is better")
    said = "What SFT and PPO lose of what the base model knew, and what PPO-ptx wins back."
    texts = [NEEDS_EVAL] if not metrics else [said] if found else ["The data hold no public tasks and no text."]
    return Section("tax", "The alignment tax", texts, of.named("tax_tasks", "tax_text_loss"), found)


def harness(metrics: Metrics, of: Charts) -> Section:
    return Section("harness", "Public NLP tasks", (), of.named("harness"), tables.harness(metrics))


def overoptimisation(metrics: Metrics, of: Charts) -> Section:
    measured = metrics.get("overoptimisation")
    if not measured:
        return Section("overoptimisation", "Over-optimisation")
    titles = {name: model["name"] for name, model in metrics["models"].items()}
    texts = [line for name in measured["policies"] for line in overopt.verdict(measured, name, titles[name])]
    texts += [overopt.length_sentence(titles[name], row) for name, row in measured.get("within_length", {}).items()]
    drawn, found = of.named("overoptimisation"), tables.overoptimisation(metrics)
    return Section("overoptimisation", "Over-optimisation", texts, drawn, found, measured["notes"])


def reward_model(metrics: Metrics) -> Section:
    return Section("reward-model", "The reward model", tables=tables.kept([tables.reward_model(metrics)]))


def training(run: Run) -> Section:
    """PPO's curves."""
    drawn = panels.of_ppo(run)
    texts = ["Means over an iteration's episodes, as the trainer logged them."] if drawn else []
    for name in panels.POLICIES:
        if name in run.parts and run.parts[name].log is None:
            texts.append(f"There is no log of {name}: {state(run.parts[name])}.")
        elif name in run.parts and run.parts[name].artifact is None:
            texts.append(f"{name} is not finished; these are its curves so far.")
    return Section("training", "PPO's training", texts, drawn, small=True)


def before(run: Run) -> Section:
    return Section("before", "Training before PPO", charts=panels.before_ppo(run), small=True)


def stages(run: Run) -> Table:
    """Where every number comes from."""
    rows = []
    for part in run.parts.values():
        made = part.artifact.made if part.artifact else {}
        took = duration(made["seconds"]) if made.get("seconds") is not None else "-"
        rows.append(
            [part.stage, part.fingerprint, state(part), took, str(made.get("at", "-")), str(made.get("host", "-"))]
        )
    return Table(["stage", "fingerprint", "state", "took", "made at", "on"], rows, words=6)


def state(part: Part) -> str:
    """Whether a stage's artifact is there, in a word or with the reason."""
    if part.artifact:
        return f"out of date: {part.why}" if part.why else "made"
    if part.begun:
        return "begun, not finished"
    return f"not made ({part.why})" if part.why else "not made"


def versions(run: Run) -> dict[str, str]:
    """The versions of what made the last artifact that there is."""
    parts = [part.artifact.made for part in run.parts.values() if part.artifact]
    last = parts[-1] if parts else {}
    packages, found = last.get("packages", {}), {}
    for name in report.PACKAGES:
        version = packages.get(name) or (last.get("instructrl") if name == "instructrl" else None)
        found |= {name: version} if version else {}
    return found | {name: str(last[name]) for name in ("python", "platform", "cpus") if last.get(name)}


def unmeasured(metrics: Metrics) -> list[str]:
    """What this evaluation could have shown and did not measure."""
    return [what for key, what in OPTIONAL.items() if not metrics.get(key)] if metrics else []
