"""What a machine has for a stage: memory, and how fast it multiplies and reads. Without torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.failure import memory_limit
from instructrl.keys import closest, did_you_mean

MIB = 2**20
SMALL = {"cuda": 10**9, "cpu": 10**7}
"""Parameters below which half of that is reached: the matrices are too small."""


@dataclass(frozen=True)
class Hardware:
    """One GPU, or the CPU cores that a stage computes with."""

    name: str
    device: Literal["cpu", "cuda"]
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second, of that memory."""
    bf16: float
    """Dense matrix products in bfloat16, FLOP a second, as the vendor says."""
    fp32: float
    """In float32, and not TF32, which torch does not use unless told to."""
    utilisation: float = 0.35
    """The share of that which training reaches. Assumed: 35 % is usual for transformers of a billion weights."""

    def speed(self, bf16: bool, parameters: int) -> float:
        """FLOP a second that a stage will do."""
        share = self.utilisation * (0.5 if parameters < SMALL[self.device] else 1)
        return share * (self.bf16 if bf16 else self.fp32)

    def step(self, layers: int, adapters: bool) -> float:
        """Seconds that a step of decoding takes at least, whatever it computes: Python, and on a GPU its launches."""
        return (4e-4 if self.device == "cuda" else 1.5e-4) * layers * (3 if adapters else 1)


def _gpu(name: str, mib: int, bandwidth: float, bf16: float, fp32: float) -> Hardware:
    """Memory in MiB as nvidia-smi tells it, GB/s and TFLOP/s as data sheets do."""
    return Hardware(name, "cuda", mib * MIB, bandwidth * 1e9, bf16 * 1e12, fp32 * 1e12)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 183_359, 8000, 2250, 75),
        _gpu("h200", 143_771, 4800, 989, 67),
        _gpu("h100", 81_559, 3350, 989, 67),
        _gpu("a100-80gb", 81_920, 2039, 312, 19.5),
        _gpu("a100-40gb", 40_960, 1555, 312, 19.5),
        _gpu("l40s", 46_068, 864, 362, 91.6),
        _gpu("a10g", 23_028, 600, 70, 31.2),
        _gpu("l4", 23_034, 300, 121, 30.3),
        _gpu("rtx-4090", 24_564, 1008, 165, 82.6),
        _gpu("rtx-3090", 24_576, 936, 71, 35.6),
    )
}
"""By vendor's data sheets: SXM where a card comes in several forms."""

CORE = 3e9 * 32
"""FLOP a second of a CPU core with AVX2 in float32: 3 GHz, two fused products of eight numbers a cycle."""
CPU_BANDWIDTH = 2e10


def named(name: str, recipe: Recipe) -> Hardware:
    """The hardware of that name.

    Raises:
        UserError: there is none.
    """
    if name == "cpu":
        return cpu(recipe)
    if name not in GPUS:
        near = closest(name, ["cpu", *GPUS])
        close = [gpu for gpu in GPUS if gpu.startswith(f"{name}-")] or ([near] if near else [])
        raise UserError(
            f"--on {name}: nothing is known of it.{did_you_mean(close)} There is {', '.join(['cpu', *GPUS])}."
        )
    return GPUS[name]


def here(recipe: Recipe) -> Hardware:
    """What `runtime.device` says: this machine's GPU, if it has one and may use it, else its CPU.

    Raises:
        UserError: `runtime.device` asks for a device that this machine does not have.
    """
    wanted = recipe.runtime.device
    found = gpu() if wanted in ("auto", "cuda") else None
    if found:
        return found
    if wanted == "cuda":
        raise UserError(
            f"runtime.device=cuda: this machine has no CUDA device; name one, `--on h100` ({', '.join(GPUS)}), or set "
            "runtime.device=cpu."
        )
    return cpu(recipe)


def cpu(recipe: Recipe) -> Hardware:
    """This machine's cores and main memory, or what our control group may have of it."""
    import psutil

    total, limit = psutil.virtual_memory().total, memory_limit()
    cores = recipe.runtime.threads or max(1, (os.cpu_count() or 1) // recipe.runtime.jobs)
    speed = cores * CORE
    memory = total if limit is None else min(total, limit)
    return Hardware(f"cpu ({cores} {'core' if cores == 1 else 'cores'})", "cpu", memory, CPU_BANDWIDTH, speed, speed)


@cache
def gpu() -> Hardware | None:
    """This machine's first GPU, by nvidia-smi; None without one."""
    if not (Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi")):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return like(said.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def like(said: str) -> Hardware:
    """`NVIDIA H100 80GB HBM3, 81559`: the GPU of the table that it is, with the memory that it has. Of a card that is
    not there the speed is taken for that of the slowest that has no less memory."""
    name, mib = said.rsplit(",", 1)
    memory, words = int(mib) * MIB, name.lower().replace("-", " ").split()
    same = [one for one in GPUS.values() if all(part in words or part.endswith("gb") for part in one.name.split("-"))]
    if same:
        return replace(min(same, key=lambda one: abs(one.memory - memory)), memory=memory)
    larger = [one for one in GPUS.values() if one.memory >= memory]
    slowest = min(larger or GPUS.values(), key=lambda one: one.bf16)
    return replace(slowest, name=f"{name.strip()}, as fast as {slowest.name} here", memory=memory)
