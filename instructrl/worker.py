"""The process of one stage: reads `order.json`, runs the stage's module, writes `result.json` last.

`python -m instructrl.worker FOLDER` runs a stage; `python -m instructrl.worker --check` reads a recipe from stdin and
lets the stages check their `trainer` mappings against TRL before anything trains; `--preview` tokenises examples.
"""

import importlib
import json
import math
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from instructrl.artifacts import ERROR, ORDER, RESULT, write_atomically
from instructrl.config import Recipe
from instructrl.errors import UserError


def main(folder: Path) -> int:
    """Run the stage whose order lies in the folder. Returns the exit status; `error.json` says what went wrong."""
    try:
        order = json.loads((folder / ORDER).read_text())
        recipe = Recipe.model_validate(order["recipe"])
        inputs = {name: Path(path) for name, path in order["inputs"].items()}
        module = stage_module(order["module"])
        prepare_torch(recipe)
        metrics = finite(module.run(order["stage"], recipe, inputs, folder))
        write_atomically(folder / RESULT, json.dumps(metrics, indent=2))
    except UserError as error:
        return report(folder, str(error), error.exit_code)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split()) or "no message"
        return report(folder, f"{type(error).__name__}: {message}", 1)
    return 0


def report(folder: Path, message: str, exit_code: int) -> int:
    """Leave the sentence for the runner to print."""
    print(message, file=sys.stderr, flush=True)
    write_atomically(folder / ERROR, json.dumps({"message": message, "exit_code": exit_code}))
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


if __name__ == "__main__":
    answers = {"--check": check, "--preview": preview}
    sys.exit(answers[sys.argv[1]]() if sys.argv[1] in answers else main(Path(sys.argv[1])))
