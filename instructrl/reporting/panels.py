"""Training curves: a small chart a quantity, from what the trainers logged."""

from collections.abc import Sequence

from instructrl.reporting.drawing import NARROW, Chart, dashes, drawing, ink, label
from instructrl.reporting.logs import PPO, SUPERVISED, Point, Quantity, curve, lines
from instructrl.reporting.runs import Part, Run
from instructrl.stages.names import NAMES

POLICIES = ("ppo", "ppo_ptx")
BEFORE = {
    "pretrain": "Pretraining",
    "sft": "SFT",
    "reward_model": "Reward model",
    "judge": "Judge",
    "ppo_init": "PPO's start",
}
INKS = {"ppo_init": "gpt-prompted", "judge": "best-of-n", "reward_model": "ppo", "pretrain": "gpt"}
HEIGHT, MARGINS = 2.2, {"left": 0.15, "right": 0.985, "top": 0.9, "bottom": 0.22}
Curve = tuple[str, str, list[Point]]
"""What it is called, whose colour it has, and its points."""


def of_ppo(run: Run) -> list[Chart]:
    """PPO beside PPO-ptx: reward, KL, length, entropy and so on, over episodes."""
    found = []
    for quantity in PPO:
        curves = [(NAMES[name], name, points(run, run.parts[name], quantity)) for name in POLICIES if name in run.parts]
        chart = panel(f"ppo_{quantity.name}", quantity.title, quantity.unit, curves, "episodes")
        found += [chart] if chart else []
    return found


def before_ppo(run: Run) -> list[Chart]:
    """What pretraining, SFT and the reward models logged, a chart a stage and quantity."""
    found = []
    for stage, title in BEFORE.items():
        for quantity in SUPERVISED if stage in run.parts else ():
            curves = [(title, INKS.get(stage, stage), points(run, run.parts[stage], quantity))]
            name, said = f"{stage}_{quantity.name}", f"{title}: {quantity.title.lower()}"
            chart = panel(name, said, quantity.unit, curves, "steps", named=False)
            found += [chart] if chart else []
    return found


def of_two(runs: Sequence[tuple[str, str, Run]]) -> list[Chart]:
    """Both runs' curves of each policy. A run is (what it is called, its colour, the run)."""
    found = []
    for policy in POLICIES:
        for quantity in PPO:
            curves = [
                (called, colour, points(run, run.parts[policy], quantity))
                for called, colour, run in runs
                if policy in run.parts
            ]
            title = f"{NAMES[policy]}: {quantity.title[0].lower()}{quantity.title[1:]}"
            chart = panel(f"{policy}_{quantity.name}", title, quantity.unit, curves, "episodes")
            found += [chart] if chart else []
    return found


def points(run: Run, part: Part, quantity: Quantity) -> list[Point]:
    """The curve of a stage that is there, or was interrupted."""
    sections = part.artifact.key["config"] if part.artifact else run.recipe
    batch = sections.get(part.stage, {}).get("batch_size")
    if quantity.name == "eos" and not batch:
        return []
    return curve(lines(part.log), quantity, batch)


def panel(name: str, title: str, unit: str, curves: Sequence[Curve], places: str, named: bool = True) -> Chart | None:
    """Lines over episodes or steps; None where nobody logged the quantity."""
    there = [one for one in curves if one[2]]
    if not there:
        return None
    chart = Chart(name, f"{title}, {unit}, over {places}")
    with drawing(chart, HEIGHT, NARROW, MARGINS) as (figure, axes):
        for called, colour, at in there:
            x, y = zip(*at, strict=True)
            style, lone = dashes(colour) if named else "-", "o" if len(at) == 1 else None
            axes.plot(x, y, color=ink(colour), linestyle=style, marker=lone, label=label(called))
        figure.text(0.01, 0.94, title, weight="bold", fontsize=9)
        figure.text(0.99, 0.94, unit, horizontalalignment="right", color=ink("muted"), fontsize=8)
        axes.set_xlabel(places, color=ink("muted"), fontsize=8, loc="right", labelpad=2)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=5)
        if named:
            figure.legend(loc="lower left", ncols=3, borderaxespad=0, handletextpad=0.5)
    return chart
