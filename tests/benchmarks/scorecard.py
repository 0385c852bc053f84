"""The scorecards of runs that differ in their seed alone, side by side, as Markdown: `make scorecard`.

python tests/benchmarks/scorecard.py 0 1 2 [recipe=NAME] [key=value]
"""

import json
import subprocess
import sys
from pathlib import Path

from instructrl.stages.scorecard import across, tally


def metrics(seed: str, arguments: list[str]) -> dict:
    """`metrics.json` of the evaluation with this seed, which must have been made."""
    command = [sys.executable, "-m", "instructrl", "show", "eval", "--json", f"seed={seed}", *arguments]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads((Path(json.loads(shown)["path"]) / "metrics.json").read_text())


def main(arguments: list[str]) -> None:
    seeds = [argument for argument in arguments if argument.isdigit()]
    runs = {f"seed {seed}": metrics(seed, [a for a in arguments if not a.isdigit()])["scorecard"] for seed in seeds}
    print(across(runs))
    for title, rows in runs.items():
        print(f"\n{title}: {tally(rows)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
