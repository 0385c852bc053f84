"""What is printed when memory or disk run out or a folder is read-only: real errors, provoked."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Instructrl

from instructrl import failure
from instructrl.config import Recipe, Runtime

RECIPE = Recipe(model={"path": None}, data={"world": {}}, eval={"judge": "gold"})


def write_script(here: Path, **stages: dict) -> None:
    (here / "script.json").write_text(json.dumps(stages))


def again(err: str) -> str:
    return err.splitlines()[-1]


def test_no_memory_names_the_keys_that_lower_it(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, sft={"end": "starve"})
    failed = instructrl("sft", "recipe=base.yaml")
    assert failed.code == 1
    assert failed.err.startswith(
        "Error: sft ran out of memory: set runtime.micro_batch_size below 8 or runtime.gradient_checkpointing=true; it "
        "then goes on from where it is (MemoryError: ).\n  | Traceback"
    )
    assert "Its log: artifacts/sft/" in failed.err
    assert again(failed.err) == "Go on with: instructrl sft recipe=base.yaml"


def test_a_full_disk(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, sft={"end": "full"})
    failed = instructrl("sft", "recipe=base.yaml")
    assert failed.code == 1
    assert re.match(
        r"Error: sft could not write: the disk of \S+/sft/\w+\.partial, or its quota, is full \(\S+ \wiB of \S+ \wiB "
        r"are free now\); make room there, or set runtime\.output_dir to a folder on another disk \(OSError: .*space",
        failed.err,
    )
    assert again(failed.err) == "Go on with: instructrl sft recipe=base.yaml"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_while_the_stage_writes(here: Path, instructrl: Instructrl, fakes: None, tmpfs: Path) -> None:
    """Neither the stage's log nor its error can be written any more; what was made is kept, and the run goes on."""
    write_script(here, sft={"end": "fill", "steps": 2})
    failed = instructrl("sft", "recipe=base.yaml", f"runtime.output_dir={tmpfs}")
    assert failed.code == 1
    full = (
        rf"could not write: the disk of {tmpfs}/sft/\w+\.partial, or its quota, is full \(0 B of 1 MiB are free now\)"
    )
    assert re.search(full, failed.err)
    assert again(failed.err) == f"Go on with: instructrl sft recipe=base.yaml runtime.output_dir={tmpfs}"
    [big] = tmpfs.glob("sft/*/big")
    assert len(list(tmpfs.glob("data/*/manifest.json"))) == 1
    big.unlink()
    write_script(here)
    assert instructrl("sft", "recipe=base.yaml", f"runtime.output_dir={tmpfs}").code == 0


def test_a_disk_that_is_full_from_the_start(here: Path, instructrl: Instructrl, fakes: None, tmpfs: Path) -> None:
    (tmpfs / "filler").write_bytes(bytes(2**20 - 4096))
    failed = instructrl("data", "recipe=base.yaml", f"runtime.output_dir={tmpfs}")
    assert failed.code == 1
    assert f"could not write: the disk of {tmpfs}" in failed.err
    assert "Traceback" not in failed.err


def test_a_read_only_folder(here: Path, instructrl: Instructrl, fakes: None, tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    failed = instructrl("data", "recipe=base.yaml", f"runtime.output_dir={tmpfs}")
    assert failed.code == 1
    assert failed.err.startswith(
        f"Error: data could not write: {tmpfs}/data is on a read-only file system; set runtime."
    )


def test_no_permission_is_told() -> None:
    told = failure.writing(PermissionError(13, "Permission denied", "artifacts/sft"))
    assert told.startswith(
        "could not write: there is no permission for artifacts/sft; grant it, or set runtime.output_dir"
    )


@pytest.fixture
def small_group(tmp_path: Path) -> Iterator[Path]:
    """A control group whose processes may have 128 MiB."""
    roots = [(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")]
    root, limit = next((pair for pair in roots if (pair[0] / "cgroup.procs").exists()), roots[1])
    group = root / f"instructrl-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(2**27))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("a control group needs root")
    yield group
    group.rmdir()


def test_a_stage_that_the_kernel_kills_for_memory(here: Path, small_group: Path) -> None:
    write_script(here, sft={"end": "eat"})
    enter = f"echo $$ > {small_group}/cgroup.procs && exec {sys.executable} -m fakes.cli sft recipe=base.yaml"
    done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (
        "sft was killed by the kernel, which was out of memory (the limit here is 128 MiB): set "
        "runtime.micro_batch_size below 8 or runtime.gradient_checkpointing=true; it then goes on from where it is.\n"
    ) in done.stderr
    assert again(done.stderr) == "Go on with: instructrl sft recipe=base.yaml"


def test_torch_without_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    told = failure.explained(caught.value, "ppo", RECIPE, tmp_path)
    assert told.startswith(
        "ran out of memory: set runtime.max_tokens below 4096 or runtime.generation_batch_size below"
    )
    assert "(RuntimeError: " in told


@pytest.mark.parametrize(
    "text",
    [
        # as CUDA, cuBLAS, MPS, C++, the dynamic linker, NumPy and Arrow say it
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "RuntimeError: MPS backend out of memory (MPS allocated: 8.0 GB, max allowed: 9.0 GB)",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "ImportError: libtorch_cpu.so: failed to map segment from shared object",
        "_ArrayMemoryError: Unable to allocate 8.00 PiB for an array with shape (1125899906842624,)",
        "ArrowMemoryError: malloc of size 1099511627776 failed",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_how_others_say_it(tmp_path: Path, text: str) -> None:
    assert failure.recognised(text, "eval", RECIPE, tmp_path).startswith(
        "ran out of memory: set runtime.max_tokens below"
    )


def test_the_error_that_an_error_came_from_counts(tmp_path: Path) -> None:
    error = ValueError("wrapped")
    error.__cause__ = MemoryError()
    assert failure.explained(error, "sft", RECIPE, tmp_path).startswith("ran out of memory")
    assert failure.explained(ValueError("no memory of it"), "sft", RECIPE, tmp_path) is None


def test_keys_that_cannot_go_lower_are_not_named() -> None:
    runtime = Runtime(micro_batch_size=1, gradient_checkpointing=True)
    least = RECIPE.model_copy(update={"runtime": runtime})
    assert failure.less_memory("sft", least) == "nothing in the recipe lowers it further; use a machine with more"
    assert failure.less_memory("reward_model", least).startswith("set runtime.max_tokens below 4096; ")
    assert failure.less_memory("pretrain", RECIPE) == "set pretrain.tokens_per_step below 2048 or " + (
        f"pretrain.hidden_size below {RECIPE.pretrain.hidden_size}"
    )


def test_every_stage_has_keys() -> None:
    from instructrl.pipeline import NAMES

    assert set(failure.LOWER) == set(NAMES)


def test_sizes_are_for_people() -> None:
    assert [failure.size(n) for n in (0, 1536, 2**20 * 128, 2**30 * 3 // 2)] == ["0 B", "1.5 KiB", "128 MiB", "1.5 GiB"]
