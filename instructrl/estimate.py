"""What a recipe will take on a machine: memory a phase, tokens, operations, hours and disk, before anything is made.

Nothing is downloaded but, at most, the model's config.json. `docs/estimate.md` tells what is counted and how well it
agrees with what was measured.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

from pydantic import ValidationError

from instructrl import estimate_memory, workload
from instructrl.config import LoRA, Recipe
from instructrl.data_size import Amounts, amounts
from instructrl.display import duration
from instructrl.errors import UserError
from instructrl.estimate_memory import Device, Phase
from instructrl.hardware import GPUS, Hardware, here
from instructrl.pipeline import stages
from instructrl.shapes import Shape, shape
from instructrl.workload import Work

ROOM = 0.95
"""Of the memory there is, that a stage may take: a GPU's allocator leaves holes, and a system needs some itself."""
LEAST_TOKENS = 256


@dataclass(frozen=True)
class Row:
    """What a stage will take."""

    stage: str
    phases: list[Phase]
    work: Work
    seconds: float
    disk: int

    @property
    def peak(self) -> Phase:
        return estimate_memory.peak(self.phases)


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take."""

    recipe: Recipe
    shape: Shape
    hardware: Hardware
    amounts: Amounts
    rows: list[Row]

    @property
    def peak(self) -> Phase:
        """Of all stages, which run one after the other; where they run side by side, the runner sees to it that memory
        has room."""
        return max((row.peak for row in self.rows if row.phases), key=lambda phase: phase.total)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def disk(self) -> int:
        """Bytes of all artifacts, and of the checkpoints of the stage that has the largest."""
        kept = max(workload.checkpoints(row.stage, self.recipe, self.shape) for row in self.rows)
        return sum(row.disk for row in self.rows) + kept

    @property
    def fits(self) -> bool:
        return self.peak.total <= ROOM * self.hardware.memory


def estimate(recipe: Recipe, shape: Shape, hardware: Hardware) -> Estimate:
    """Of every stage that the recipe has."""
    counted = amounts(recipe, shape)
    rows = []
    for stage, node in stages(recipe).items():
        phases = estimate_memory.phases(stage, recipe, shape, hardware.device)
        work = workload.work(stage, recipe, shape, counted)
        seconds = time_of(work, recipe, shape, hardware, beside(recipe, hardware) if node.distributed else 1)
        rows.append(Row(stage, phases, work, seconds, workload.disk(stage, recipe, shape)))
    return Estimate(recipe, shape, hardware, counted, rows)


def beside(recipe: Recipe, hardware: Hardware) -> int:
    """Machines of that speed that a stage's processes are: on a CPU they share its cores, unless `runtime.threads`
    gives each its own."""
    runtime = recipe.runtime
    return runtime.ranks if hardware.device == "cuda" or runtime.threads else runtime.nodes


def time_of(work: Work, recipe: Recipe, shape: Shape, hardware: Hardware, machines: int = 1) -> float:
    """Seconds: the operations at the speed assumed, and the steps of decoding, each of which reads all weights. What
    processes tell each other is taken to cost nothing."""
    computing = work.flops / hardware.speed(workload.in_bf16(recipe), shape.policy) / machines
    step = max(work.step_bytes / hardware.bandwidth, hardware.step(shape.layers, recipe.model.lora is not None))
    return workload.START + computing + work.steps * step


# ---- what does not fit


def check(found: Estimate) -> None:
    """Refuse what cannot fit, with what would make it fit.

    Raises:
        UserError: it does not fit.
    """
    if found.fits:
        return
    peak, hardware = found.peak, found.hardware
    raise UserError(
        f"{peak.stage} needs about {gigabytes(peak.total)} ({peak.name}), and {hardware.name} has "
        f"{gigabytes(hardware.memory)}: {remedy(found)}."
    )


def remedy(found: Estimate) -> str:
    """`set runtime.max_tokens=2048 (it then takes 61 GB)`: the first change, or the fewest, with which it fits."""
    for changes in remedies(found.recipe):
        changed = found.recipe.model_copy(
            update={
                section: getattr(found.recipe, section).model_copy(update=values) for section, values in changes.items()
            }
        )
        if not allowed(changed):
            continue
        with_it = most(changed, found.shape, found.hardware.device)
        if with_it.total <= ROOM * found.hardware.memory:
            keys = " ".join(spelt(section, values) for section, values in changes.items())
            return f"set {keys} (it then takes {gigabytes(with_it.total)})"
    larger = [gpu for gpu in GPUS.values() if found.peak.total <= ROOM * gpu.memory]
    other = f", or a machine like {min(larger, key=lambda gpu: gpu.memory).name}" if larger else ""
    return f"no key of the recipe makes it fit; it needs a smaller model{other}"


def allowed(recipe: Recipe) -> bool:
    """Whether its values go together."""
    try:
        Recipe.model_validate(recipe.model_dump())
    except ValidationError:
        return False
    return True


def most(recipe: Recipe, shape: Shape, device: Device) -> Phase:
    """The phase of all stages that takes the most memory."""
    return estimate_memory.peak(
        [phase for stage in stages(recipe) for phase in estimate_memory.phases(stage, recipe, shape, device)]
    )


def remedies(recipe: Recipe) -> Iterator[dict[str, dict[str, object]]]:
    """Changes that lower memory: first one key that changes no result, then several, then adapters."""
    runtime = recipe.runtime
    smaller = {
        "max_tokens": list(halves(runtime.max_tokens, LEAST_TOKENS)),
        "micro_batch_size": list(halves(runtime.micro_batch_size, 1)),
        "generation_batch_size": list(halves(runtime.generation_batch_size, 8)),
    }
    checkpointing: dict[str, object] = {} if runtime.gradient_checkpointing else {"gradient_checkpointing": True}
    for key, values in smaller.items():
        for value in values:
            yield {"runtime": {key: value}}
    if checkpointing:
        yield {"runtime": checkpointing}
    sharing: dict[str, object] = {"sharding": "fsdp"} if runtime.ranks > 1 and runtime.sharding != "fsdp" else {}
    if sharing:
        yield {"runtime": sharing}
    together: dict[str, object] = checkpointing | sharing
    for step in range(max(map(len, smaller.values()))):
        together |= {key: values[step] for key, values in smaller.items() if step < len(values)}
        yield {"runtime": dict(together)}
    if recipe.model.lora is None:
        for precision in ({}, {"dtype": "bfloat16"}):
            model: dict[str, object] = {"lora": LoRA()} | precision
            yield {"model": model}
            yield {"model": model, "runtime": dict(together)}


def halves(value: int, least: int) -> Iterator[int]:
    """`8192 -> 4096, 2048, ...`, down to the least."""
    while value // 2 >= least:
        value //= 2
        yield value


def spelt(section: str, values: dict[str, object]) -> str:
    """As on the command line."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"{section}.{key}={'{}' if key == 'lora' else words.get(value, value) if isinstance(value, bool) else value}"
        for key, value in values.items()
    )


# ---- print


def memory_line(recipes: Iterable[Recipe]) -> str | None:
    """A plan's line on memory, of the recipe that takes the most; None where nothing is known of its model."""
    found: list[tuple[Phase, Hardware | None]] = []
    seen: set[str] = set()  # of a sweep over seeds all points take the same
    for recipe in recipes:
        if (content := recipe.model_dump_json(exclude={"name", "seed"})) in seen:
            continue
        seen.add(content)
        with suppress(UserError):
            machine = _here(recipe)
            device = machine.device if machine else "cuda"
            found.append((most(recipe, shape(recipe), device), machine))
    if not found:
        return None
    peak, machine = max(found, key=lambda one: one[0].total)
    needs = f"Memory: about {gigabytes(peak.total)} at most, in {peak.stage} ({peak.name})"
    if machine is None:
        return f"{needs}, of a GPU, which this machine does not have; `instructrl estimate --on h100` says more."
    if peak.total > ROOM * machine.memory:
        return f"{needs}, and this machine has {gigabytes(machine.memory)}; `instructrl estimate` says what would help."
    return f"{needs}; this machine has {gigabytes(machine.memory)}."


def _here(recipe: Recipe) -> Hardware | None:
    """This machine, as `hardware.here`; None where the recipe is for a GPU and there is none."""
    try:
        return here(recipe)
    except UserError:
        return None


def show(found: Estimate) -> None:
    """The table, and what it assumes."""
    from instructrl.printout import print_table

    hardware, shape, recipe = found.hardware, found.shape, found.recipe
    bf16 = workload.in_bf16(recipe)
    speed, kind = (hardware.bf16, "bfloat16") if bf16 else (hardware.fp32, "float32")
    share = hardware.speed(bf16, shape.policy) / speed
    print(
        f"{recipe.name} on {several(found)}{hardware.name}: {gigabytes(hardware.memory)} of memory, "
        f"{hardware.bandwidth / 1e9:,.0f} GB/s, {speed / 1e12:.3g} TFLOP/s in {kind}, of which {share:.0%} are assumed."
    )
    lora = recipe.model.lora
    trained = f", of which an adapter of {shape.adapter(lora):,} trains" if lora else ""
    print(
        f"{recipe.model.path or 'the model that pretrain makes'}: {shape.policy:,} parameters{trained}; with a scalar "
        f"head, as reward model and critic, {shape.scalar:,}."
    )
    rows = [
        [
            row.stage,
            row.peak.name if row.phases else "",
            gigabytes(row.peak.total) if row.phases else "",
            count(row.work.tokens),
            count(row.work.flops),
            duration(row.seconds),
            gigabytes(row.disk) if row.disk else "",
        ]
        for row in found.rows
    ]
    every = [row.work for row in found.rows]
    totals = [count(sum(work.tokens for work in every)), count(sum(work.flops for work in every))]
    rows.append(["all", "", gigabytes(found.peak.total), *totals, duration(found.seconds), gigabytes(found.disk)])
    print_table(["stage", "peak at", "memory", "tokens", "FLOPs", "time", "disk"], rows, left=2)
    peak = found.peak
    held = ", ".join(
        f"{part} {gigabytes(size)}" for part, size in sorted(peak.parts.items(), key=lambda part: -part[1])
    )
    print(f"{peak.stage}, {peak.name}: {held}.")
    for line in found.amounts.said:
        print(f"Data: {line}.")


def several(found: Estimate) -> str:
    """`8 x `, of GPUs; what is said of memory is then said of one."""
    ranks = found.recipe.runtime.ranks
    return f"{ranks} x " if ranks > 1 and found.hardware.device == "cuda" else ""


def as_json(found: Estimate) -> str:
    """All of it."""
    lora = found.recipe.model.lora
    return json.dumps(
        {
            "recipe": found.recipe.name,
            "hardware": asdict(found.hardware),
            "parameters": {
                "policy": found.shape.policy,
                "reward_model": found.shape.scalar,
                "adapter": found.shape.adapter(lora) if lora else None,
            },
            "fits": found.fits,
            "peak": {"stage": found.peak.stage, "phase": found.peak.name, "bytes": found.peak.total},
            "seconds": found.seconds,
            "disk": found.disk,
            "data": asdict(found.amounts),
            "stages": [
                {
                    "stage": row.stage,
                    "phases": [
                        {"phase": phase.name, "bytes": phase.total, "parts": phase.parts} for phase in row.phases
                    ],
                    "tokens": row.work.tokens,
                    "flops": row.work.flops,
                    "decoding_steps": row.work.steps,
                    "seconds": row.seconds,
                    "disk": row.disk,
                    "checkpoints": workload.checkpoints(row.stage, found.recipe, found.shape),
                }
                for row in found.rows
            ],
        },
        indent=2,
    )


def gigabytes(size: float) -> str:
    """`640 MB`, `1.5 GB`, `62 GB`."""
    if size < 1e9:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def count(number: float) -> str:
    """`820 k`, `36 M`, `1.2e18`."""
    for unit, size in (("", 1), (" k", 1e3), (" M", 1e6), (" G", 1e9)):
        if number < 1000 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.1e}"
