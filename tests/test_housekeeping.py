"""The commands verify, logs and diff on what the fake stages have made."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Instructrl, until

from instructrl.comparison import differences, metrics, side
from instructrl.verification import verify


def folder(here: Path, stage: str) -> Path:
    [path] = [path for path in (here / "artifacts" / stage).iterdir() if path.is_dir() and not path.suffix]
    return path.relative_to(here)


@pytest.fixture
def made(here: Path, instructrl: Instructrl, fakes: None) -> Path:
    assert instructrl("run-all", "recipe=base.yaml").code == 0
    return here


def test_verify_finds_what_changed(made: Path, instructrl: Instructrl) -> None:
    good = instructrl("verify", "recipe=base.yaml")
    assert good.code == 0
    assert [line.split()[:2] for line in good.out.splitlines()] == [
        ["good", stage] for stage in ("data", "sft", "ppo", "ppo_ptx", "eval")
    ]
    sft = folder(made, "sft")
    text = (sft / "out.txt").read_text()
    flipped = chr(ord(text[3]) ^ 1)
    (sft / "out.txt").write_text(text[:3] + flipped + text[4:])  # one bit, the same size
    bad = instructrl("verify", "sft", "recipe=base.yaml")
    assert bad.code == 1
    assert re.match(r"bad   sft +[0-9a-f]{12}  \d files, [\d.]+ kB\n      out.txt: its content changed\n", bad.out)
    assert bad.out.splitlines()[-1] == f"To make sft again, delete {sft} and run the same recipe."
    assert instructrl("verify", "recipe=base.yaml").code == 1
    assert instructrl("verify", "ppo", "recipe=base.yaml").code == 0
    (sft / "out.txt").write_text(text)
    assert instructrl("verify", str(sft)).code == 0
    assert instructrl("verify", f"sft/{sft.name[:5]}", "recipe=base.yaml").code == 0


def test_verify_names_each_kind_of_change(made: Path) -> None:
    data = folder(made, "data")
    for change, said in {
        "more": "out.txt: 65 bytes in place of 64",
        "gone": "out.txt: gone",
    }.items():
        text = (data / "out.txt").read_text()
        (data / "out.txt").write_text(text + "x") if change == "more" else (data / "out.txt").unlink()
        assert verify(data).changed == (said,)
        (data / "out.txt").write_text(text)
    (data / "added.txt").touch()
    with (data / "stage.log").open("a") as log:
        log.write("more")
    found = verify(data)
    assert found.changed == ()
    assert found.noted[0].startswith("stage.log: ")
    assert found.noted[0].endswith(" (no stage reads it)")
    assert found.noted[1] == "added.txt: not in the manifest"
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"key": {"stage": "data"}}))
    assert verify(data).changed == ("manifest.json: not as it was written",)


def test_verify_without_anything(here: Path, instructrl: Instructrl, fakes: None) -> None:
    for arguments, said in (
        (["verify", "recipe=base.yaml"], "Nothing of this recipe has been made yet"),
        (["verify", "sft", "recipe=base.yaml"], "sft is not made: "),
        (["verify", "abcdef", "recipe=base.yaml"], "There is no artifact abcdef in artifacts; "),
        (["verify", "stf", "recipe=base.yaml"], "There is no stage 'stf'. Did you mean sft?"),
        (["logs", "sft", "recipe=base.yaml"], "sft has no log: it was never begun"),
        (["diff", "abcdef", "base.yaml"], "There is no artifact abcdef in artifacts; "),
        (["diff", "sft", "base.yaml"], "sft is not made: there is no artifacts/sft/"),
    ):
        result = instructrl(*arguments)
        assert result.code == 2
        assert result.err.startswith(f"Error: {said}")


def test_logs(made: Path, instructrl: Instructrl) -> None:
    log = folder(made, "sft") / "stage.log"
    log.write_bytes(b"one\n  0%|  |\r 50%|- |\r100%|--|\nthree \x1b[31m\nhalf")
    assert instructrl("logs", "sft", "recipe=base.yaml").out == "one\n100%|--|\nthree \\u001b[31m\nhalf\n"
    assert instructrl("logs", "sft", "recipe=base.yaml", "-n", "2").out == "100%|--|\nthree \\u001b[31m\nhalf\n"
    assert instructrl("logs", "sft", "recipe=base.yaml", "-n", "0", "-f").out == "half\n"  # it is not running


def test_logs_follow_a_stage_to_its_end(
    here: Path, instructrl: Instructrl, spawn: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "script.json").write_text(json.dumps({"data": {"steps": 100, "seconds": 0.05}}))
    running = spawn("data", "recipe=base.yaml")
    until(lambda: list(here.glob("artifacts/data/*.partial/stage.log")))
    [log] = here.glob("artifacts/data/*.partial/stage.log")
    done: list[float] = []

    def write() -> None:
        with log.open("a") as file:
            for word in ("first", "sec", "ond\n", "last"):
                file.write(word if word.endswith(("\n", "sec", "last")) else f"{word}\n")
                file.flush()
                time.sleep(0.3)
        running.terminate()  # which saves and leaves
        running.wait(20)
        done.append(time.monotonic())

    writer = threading.Thread(target=write)
    writer.start()
    followed = instructrl("logs", "data", "recipe=base.yaml", "-f")
    ended = time.monotonic()
    writer.join()
    assert followed.out.split("\n")[-4:] == ["first", "second", "last", ""]
    assert ended > done[0] - 1  # not before the stage did


def test_diff_of_recipes(made: Path, instructrl: Instructrl) -> None:
    instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.1")
    [path] = [p for p in (made / "artifacts" / "ppo").iterdir() if p.is_dir() and p.name != folder_of_base(instructrl)]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["metrics"]["loss"] == 0.25
    shown = instructrl("diff", "base.yaml", "base.yaml ppo.kl_coef=0.1").out
    assert re.search(r"^ setting +base.yaml +base.yaml ppo.kl_coef=0.1 *$", shown, re.MULTILINE)
    assert re.search(r"^ ppo.kl_coef +0.02 +0.1 *$", shown, re.MULTILINE)
    assert "sft" not in shown  # the same in both
    assert "Not made for base.yaml ppo.kl_coef=0.1: eval." in shown
    as_json = json.loads(instructrl("diff", "base.yaml", "base.yaml ppo.kl_coef=0.1", "--json").out)
    assert as_json["settings"] == {"ppo.kl_coef": [0.02, 0.1]}
    assert as_json["metrics"]["ppo.loss"] == [0.25, 0.25]
    assert instructrl("diff", "base.yaml", "base.yaml").out.startswith("Their settings are the same.")


def folder_of_base(instructrl: Instructrl) -> str:
    stages = json.loads(instructrl("plan", "recipe=base.yaml", "--json").out)["stages"]
    return next(stage["fingerprint"] for stage in stages if stage["stage"] == "ppo")


def test_diff_of_artifacts(made: Path, instructrl: Instructrl) -> None:
    before = folder(made, "ppo")
    instructrl("ppo", "recipe=base.yaml", "sft.epochs=2", "ppo.kl_coef=0.1")
    [after] = {path.name for path in (made / "artifacts" / "ppo").iterdir() if path.is_dir()} - {before.name}
    sides = side(str(before), []), side(after, ["recipe=base.yaml"])
    names = [name for name, *_ in differences(*sides)]
    assert names == ["ppo.kl_coef", "made from.sft"]
    assert {name for name, *_ in metrics(*sides)} == {"ppo.loss", "ppo.seconds"}
    shown = instructrl("diff", str(before), after, "recipe=base.yaml").out
    assert re.search(rf"^ setting +ppo/{before.name} +ppo/{after} *$", shown, re.MULTILINE)
    mixed = instructrl("diff", "base.yaml", after).out  # the recipe's own ppo
    assert re.search(r"^ ppo.kl_coef +0.02 +0.1 *$", mixed, re.MULTILINE)
    assert "sft.epochs" not in mixed
