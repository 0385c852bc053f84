"""One run of the data stage for `bench_data.py`, in a process of its own: the file of prompts, and 1 to filter PII."""

import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from instructrl.config import Recipe
from instructrl.stages import data


def watch(folder: Path, sizes: list[int], done: threading.Event) -> None:
    """Keep the largest size of the pool's file."""
    while not done.wait(0.2):
        for file in folder.glob("pool-*/pool.db"):
            try:
                sizes.append(file.stat().st_size)
            except FileNotFoundError:  # the stage has just removed it
                continue


def main() -> None:
    file, pii = sys.argv[1], bool(int(sys.argv[2]))
    with tempfile.TemporaryDirectory() as answers, tempfile.TemporaryDirectory() as folder:
        source = Path(answers) / "d.jsonl"
        rows = ({"prompt": f"q {n}", "response": f"a {n}", "text": f"t {n}"} for n in range(50))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        few = [{"path": str(source)}]
        tables = {"prompts": [{"path": file}], "demonstrations": few, "text": few}
        recipe = Recipe(data=tables | {"pii_filter": pii}, model={"path": None})
        sizes, done = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(Path(folder), sizes, done))
        watcher.start()
        start, cpu = time.perf_counter(), time.process_time()
        data.run("data", recipe, {}, Path(folder))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        done.set()
        watcher.join()
        card = json.loads((Path(folder) / "card.json").read_text())
    result = {
        "kept": sum(card["rows"].values()),
        "removed": {step["step"]: sum(step["removed"].values()) for step in card["steps"]},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "rows_per_second": round(sum(card["read"].values()) / seconds),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "pool_mb": round(max(sizes) / 2**20),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
