"""`make bench-data`: the data stage on generated prompts, from ten thousand to a million.

Prints one JSON object a size. The prompts are logged ones as a company has them: a tenth are repeats, a fifth share a
long beginning with others, and a few users wrote most. The stage runs in a process of its own, on one core.

    rows                   written to one .jsonl file
    kept                   rows of all tables
    removed                rows by step
    seconds                wall time of the whole stage: reading, deduplication, cap, split, leakage, tables, card
    cpu_seconds            of the process
    rows_per_second
    peak_mb                the process's peak memory, Python and libraries included
    pool_mb                the largest size of the pool's file
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SIZES = (10_000, 100_000, 1_000_000)


def generate(file: Path, rows: int) -> None:
    """So many prompts, the same every time."""
    rng = random.Random(rows)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    frames = [" ".join(rng.choices(words, k=24)) for _ in range(rows // 50)]
    recent: list[str] = []
    with file.open("w") as stream:
        for _ in range(rows):
            kind = rng.random()
            if recent and kind < 0.1:
                prompt = rng.choice(recent)
            else:
                own = " ".join(rng.choices(words, k=min(round(rng.lognormvariate(3.2, 0.9)) + 1, 300)))
                prompt = f"{rng.choice(frames)} {own}" if kind < 0.3 else own
            recent = [*recent[-999:], prompt] if rng.random() < 0.01 else recent or [prompt]
            user = f"user {int(rows ** rng.random())}"  # log-uniform: a few wrote most
            stream.write(json.dumps({"prompt": prompt, "user": user}) + "\n")


def measure(rows: int, pii: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        generate(file, rows)
        arguments = [sys.executable, str(HERE / "data_worker.py"), str(file), str(int(pii))]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return {"rows": rows, "pii_filter": pii} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="a size; may be given several times")
    parser.add_argument("--pii", action="store_true", help="with the PII filter, which takes longer than all the rest")
    options = parser.parse_args()
    for rows in options.rows or SIZES:
        print(json.dumps(measure(rows, options.pii)), flush=True)


if __name__ == "__main__":
    main()
