"""The process of one stage: reads `order.json`, runs the stage's module, writes `result.json` last.

`python -m instructrl.worker FOLDER` runs a stage; `python -m instructrl.worker --check` reads a recipe from stdin and
lets the stages check their `trainer` mappings against TRL before anything trains; `--preview` tokenises examples;
`--overlay` draws the figure of a sweep.
"""

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from instructrl.artifacts import ERROR, ORDER, RESULT, write_atomically
from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.failure import explained


def main(folder: Path) -> int:
    """Run the stage whose order lies in the folder. Returns the exit status; `error.json` says what went wrong."""
    recipe = None
    if ranks() > 1:
        join()
    try:
        order = json.loads((folder / ORDER).read_text())
        recipe = Recipe.model_validate(order["recipe"])
        inputs = {name: Path(path) for name, path in order["inputs"].items()}
        module = stage_module(order["module"])
        prepare_torch(recipe)
        with tracked(order["stage"], recipe, folder) as track:
            metrics = finite(module.run(order["stage"], recipe, inputs, folder))
            track(metrics)
        if rank() == 0:
            write_atomically(folder / RESULT, json.dumps(metrics, indent=2))
    except UserError as error:
        return report(folder, str(error), error.exit_code)
    except Exception as error:
        with suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        return report(folder, message, 1, explained(error, folder.parent.name, recipe, folder) if recipe else None)
    except SystemExit as stop:  # saved and stopped
        return int(stop.code or 0)
    return 0


def rank() -> int:
    """Which of the stage's processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes the stage has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Be one of several: end if their parent ends, which holds the lock, and let only rank 0 print."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    if rank() != 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)


@contextmanager
def tracked(stage: str, recipe: Recipe, folder: Path) -> Generator[Callable[[dict[str, Any]], None]]:
    """The stage's run in `runtime.tracker`; what it yields is to be told what the stage found in the end."""
    if recipe.runtime.tracker == "none" or rank() != 0:
        yield lambda metrics: None
        return
    from instructrl.stages import tracker

    with tracker.tracked(stage, recipe, folder) as run:
        yield run.finish


def leave(code: int) -> NoReturn:
    """End the process, without waiting for a tracker that does not end."""
    tracker = sys.modules.get("instructrl.stages.tracker")
    if tracker and tracker.abandoned:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def report(folder: Path, message: str, exit_code: int, cause: str | None = None) -> int:
    """Leave the sentence for the runner to print; a `cause` is what stands after the stage's name in place of "failed".

    Where even that cannot be written, the runner finds out by itself."""
    with suppress(OSError):
        print(cause or message, file=sys.stderr, flush=True)
        if ranks() > 1 and (folder / ERROR).exists():  # the first rank to fail knows why; the others lost it
            return exit_code
        said = {"message": message, "exit_code": exit_code} | ({"cause": cause} if cause else {})
        write_atomically(folder / ERROR, json.dumps(said))
    return exit_code


def finite(value: Any) -> Any:
    """The value with nan and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stage_module(name: str) -> ModuleType:
    """`sft` -> `instructrl.stages.sft`; a name with a dot is a module's full name."""
    return importlib.import_module(name if "." in name else f"instructrl.stages.{name}")


def prepare_torch(recipe: Recipe) -> None:
    """Threads and denormals, if the stage's module has imported torch; `data` of the built-in world does not."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_flush_denormal(True)  # Adam's second moments of rare tokens decay into denormals, 10x slower on x86
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)


def check() -> int:
    """Let each stage named on stdin check its section. Prints the first problem; returns 2 if there is one."""
    order = json.load(sys.stdin)
    recipe = Recipe.model_validate(order["recipe"])
    problems = []
    for name in order["modules"]:
        try:
            stage_module(name).check(recipe)
        except UserError as error:
            problems.append(str(error))
    print(json.dumps(problems))
    return 2 if problems else 0


def preview() -> int:
    """Print the examples that stdin asks for, as the model would read them; returns 2 if the recipe is wrong."""
    order = json.load(sys.stdin)
    try:
        recipe = Recipe.model_validate(order["recipe"])
        found = stage_module("preview").examples(recipe, Path(order["data"]), order["count"])
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
    return 2 if "error" in found else 0


def overlay() -> int:
    """Draw the figure of the sweep that stdin tells of."""
    print(json.dumps(stage_module("overlay").run(json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    answers = {"--check": check, "--preview": preview, "--overlay": overlay}
    leave(answers[sys.argv[1]]() if sys.argv[1] in answers else main(Path(sys.argv[1])))
