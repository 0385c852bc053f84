"""report.html and report.md: what they show, that a model's text stays text, and what they say of what is missing."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import BASE, Instructrl
from fakes import evaluation

from instructrl.artifacts import Artifact
from instructrl.reporting import charts, document, logs, runs, samples
from instructrl.reporting.drawing import THEME, Chart, drawing

SEEN = evaluation.HOSTILE.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def figures(page: Page) -> set[str]:
    """The names of the charts on a page."""
    return {str(attributes["id"]).removeprefix("chart-") for attributes in page.all("figure")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a recipe that ran to its end with everything measured, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "base.yaml").write_text(BASE)
    arguments = [f"recipe={folder / 'base.yaml'}", f"runtime.output_dir={folder / 'artifacts'}"]
    evaluation.make(arguments, evaluation.MORE)
    return arguments, document.write(runs.of_recipe(arguments))


def test_text_of_a_model_stays_text(whole: tuple[list[str], Path]) -> None:
    page = Page(whole[1])
    assert page.all("img") == []
    assert SEEN in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    assert [attributes.get("src") for attributes in page.all("script")] == [None]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_loads_nothing_and_lets_only_its_own_script_run(whole: tuple[list[str], Path]) -> None:
    text, page = whole[1].read_text(), Page(whole[1])
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert {link[:1] for link in links if link != "data:,"} == {"#"}
    assert re.findall(r"url\((?!#)|@import", text) == []
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def test_every_link_has_its_place_and_every_id_is_there_once(whole: tuple[list[str], Path]) -> None:
    page = Page(whole[1])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"].removeprefix("#") for attributes in page.all("a")} <= set(ids)


def test_everything_that_was_measured_is_shown(whole: tuple[list[str], Path]) -> None:
    page = Page(whole[1])
    drawn = figures(page)
    assert drawn >= {"win_rates", "use_cases", "tax_tasks", "tax_text_loss", "harness", "overoptimisation"}
    of_ppo = ("reward", "kl", "length", "entropy", "eos", "ptx_loss", "grad_norm", "ptx_grad_ratio", "clip_fraction")
    assert drawn >= {f"ppo_{name}" for name in of_ppo} | {"sft_loss", "reward_model_loss", "pretrain_loss"}
    for said in (
        "Any against any",
        "order agreement",
        "overall quality, 1 to 7",
        "4.10 [4.00, 4.20]",
        "makes something up",
        "The judge was asked about 23 pairs",
        "rte accuracy, 15-shot",
        "recovered",
        "PPO along its run",
        "best by the judge",
        "Best PPO by the judge: after 8 iterations",
        "1-5 tokens",
        "-0.100 [-0.130, -0.070] taxed",
        "Labelers prefer PPO-ptx to SFT (on the closest task)",
        "direction only",
        "0.4 M parameters against 175 B.",
        ".640 [.620, .660]",
        "seed: 0",
        "torch 2.13",
    ):
        assert said in page.text, said
    assert "Not measured" not in page.text
    assert "What is missing" not in page.text


def test_samples_are_side_by_side_and_know_what_they_are_filtered_by(whole: tuple[list[str], Path]) -> None:
    page = Page(whole[1])
    shown = page.all("article")
    assert len(shown) == 24
    assert not [one for one in shown if "hidden" in one]  # without the script all are there
    assert "hidden" in page.all("form")[0]
    assert shown[0]["data-case"] == "generation"
    offered = {option["value"] for option in page.all("option")}
    assert {one["data-case"] for one in shown} < offered  # the whole value: an option's text would lose line ends
    assert {verdict for one in shown for verdict in str(one["data-verdicts"]).split("|")} < offered
    assert "PPO loses to SFT" in shown[0]["data-verdicts"].split("|")
    for model in ("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx", "best_of_n"):
        assert f"{model} says 3 at 1" in page.text
        assert f"{model} says 3 at 0" not in page.text
    assert "(empty)" in page.text


def test_report_md_has_the_same_and_no_line_of_a_model_leaves_its_block(whole: tuple[list[str], Path]) -> None:
    text = whole[1].with_name("report.md").read_text()
    outside, fence = [], None
    for line in text.splitlines():
        marker = re.match(r" {0,3}(`{3,})", line)
        if fence is None and marker:
            fence = marker[1]
        elif fence and marker and len(marker[1]) >= len(fence) and line.strip() == marker[1]:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert outside.count("## Win rates") == 1
    assert "## Training before PPO" in outside
    assert not [line for line in outside if re.search(r"<(script|img)", line)]
    images = re.findall(r"!\[[^\]]*\]\((charts/\w+\.svg)\)", "\n".join(outside))
    assert len(images) > 15
    assert all((whole[1].parent / image).is_file() for image in images)


def test_rebuilding_leaves_the_artifacts_alone_and_imports_nothing_heavy(whole: tuple[list[str], Path]) -> None:
    arguments, path = whole
    before = path.read_bytes()
    script = (
        "import sys\nfrom instructrl import cli\n"
        f"sys.argv = ['instructrl', 'report', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The report: {path}\n"
    assert path.read_bytes() == before
    run = runs.of_recipe(arguments)
    assert run.missing == []
    for part in run.parts.values():
        assert Artifact.read(part.folder) is not None


def test_charts_are_replaced_one_by_one(whole: tuple[list[str], Path]) -> None:
    """Two that finish together write one report: none takes the folder away from the other."""
    arguments, path = whole
    folder = path.parent / "charts"
    names = {one.name for one in folder.iterdir()}
    held = os.open(folder, os.O_RDONLY)  # so that no other folder is given its number
    (folder / "of_an_older_version.svg").write_text("<svg/>")
    document.write(runs.of_recipe(arguments))
    assert folder.stat().st_ino == os.fstat(held).st_ino
    os.close(held)
    assert {one.name for one in folder.iterdir()} == names


def test_a_run_by_its_folder_or_fingerprint_is_the_same(whole: tuple[list[str], Path]) -> None:
    arguments, path = whole
    by_recipe = runs.of_recipe(arguments)
    folder = by_recipe.evaluation.folder
    for found in (runs.find(str(folder)), runs.find(folder.name[:6], arguments[1:])):
        assert found.folder.resolve() == path.parent.resolve()
        assert found.metrics == by_recipe.metrics
        assert found.settings() == by_recipe.settings()
        assert list(found.parts) == list(by_recipe.parts)


def test_a_missing_stage_is_named(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    shutil.copytree(Path(whole[0][1].partition("=")[2]), tmp_path / "artifacts")
    arguments = [whole[0][0], f"runtime.output_dir={tmp_path / 'artifacts'}"]
    run = runs.of_recipe(arguments)
    shutil.rmtree(run.parts["ppo"].folder)  # nobody needs it any more: eval is there
    page = Page(document.write(runs.of_recipe(arguments), count=2))
    assert "ppo: not made (its artifact is gone, and nothing that runs needs it)" in page.text
    assert f"instructrl ppo {arguments[0]}" in page.text
    assert "There is no log of ppo" in page.text
    assert ".640 [.620, .660]" in page.text

    shutil.rmtree(run.evaluation.folder)
    partial = run.parts["ppo"].folder.with_suffix(".partial")  # begun anew, and killed in the middle of a line
    partial.mkdir()
    lines = [json.dumps(line) for line in evaluation.ppo_log(ptx=False, lines=2)]
    (partial / "log.jsonl").write_text("\n".join([*lines, '{"step": 9, "obj']))
    path = document.write(runs.of_recipe(arguments))
    page = Page(path)
    assert "eval: not made" in page.text
    assert "This needs eval, which is not made." in page.text
    assert "ppo: begun, not finished" in page.text
    assert "ppo is not finished; these are its curves so far." in page.text
    assert "ppo_reward" in figures(page)
    assert page.all("article") == []
    assert "- eval: not made" in path.with_name("report.md").read_text()


def test_a_report_of_nothing_says_so(here: Path, instructrl: Instructrl) -> None:
    output = instructrl("report", "base.yaml")
    assert output.code == 0, output.err
    page = Page(Path(output.out.removeprefix("The report: ").strip()))
    for stage in ("data", "pretrain", "sft", "label", "reward_model", "ppo", "ppo_ptx", "eval"):
        assert f"{stage}: not made (never ran)" in page.text
    assert page.all("figure") == []


def test_what_was_not_measured_is_listed(here: Path) -> None:
    evaluation.make(["recipe=base.yaml"], logs=False)
    page = Page(document.write(runs.of_recipe(["recipe=base.yaml"]), count=0))
    assert "Not measured in this run: win rates of any model against any other; the judge's own card" in page.text
    assert "Over-optimisation" not in page.text
    assert "This evaluation left no samples." in page.text


def test_run_all_ends_with_the_report(here: Path, instructrl: Instructrl) -> None:
    evaluation.make(["recipe=base.yaml"], {"use_cases": {}, "tax": {"tasks": {}, "text_loss": {}}}, logs=False)
    folder = runs.of_recipe(["recipe=base.yaml"]).evaluation.folder
    (folder / "report.md").write_text("eval's own")
    output = instructrl("run-all", "recipe=base.yaml")
    path = Path(re.search(r"The report: (.*)", output.out)[1])
    assert path.name == "report.html"
    assert path.is_file()
    first = path.stat().st_mtime_ns
    instructrl("run-all", "recipe=base.yaml")
    assert path.stat().st_mtime_ns == first  # nothing new to tell
    os.utime(path, (1, 1))  # older than the evaluation
    instructrl("run-all", "recipe=base.yaml")
    assert path.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "base.yaml"], "Only one run has a report at a time; you named tiny and base.yaml."),
        (["tinny"], "There is no recipe 'tinny'. Did you mean tiny?"),
        (["abcdef"], "There is no artifact eval/abcdef in artifacts; `instructrl runs` lists those there are."),
        (["."], ". is a folder without manifest.json; name the folder of an artifact of eval."),
    ],
)
def test_runs_that_are_not_there(here: Path, instructrl: Instructrl, words: list[str], said: str) -> None:
    output = instructrl("report", *words)
    assert output.code == 2
    assert output.err.startswith(f"Error: {said}")


def test_an_artifact_of_another_version_is_refused_and_one_upstream_is_missing(
    here: Path, instructrl: Instructrl
) -> None:
    folder = evaluation.make(["recipe=base.yaml"], logs=False).path
    sft = runs.of_recipe(["recipe=base.yaml"]).parts["sft"].folder
    (sft / "manifest.json").write_text("{}")
    [part] = runs.find(str(folder)).missing
    assert (part.stage, part.why) == ("sft", "its manifest.json was changed, or written by another version")
    (folder / "manifest.json").write_text("{}")
    output = instructrl("report", str(folder))
    assert output.code == 2
    assert output.err.startswith(f"Error: {folder} cannot be used: its manifest.json was changed")


# ---- curves, samples, charts


def test_curves_are_the_logs_numbers() -> None:
    of = {quantity.name: quantity for quantity in logs.PPO}
    logged = evaluation.ppo_log(ptx=True, lines=3)
    assert logs.curve(logged, of["reward"]) == [(128, 0.25), (256, 0.5), (384, 0.75)]
    assert logs.curve(logged, of["eos"], batch_size=1024) == [(128, 50), (256, 50), (384, 50)]
    assert logs.curve(logged, of["explained_variance"]) == [(256, 0.5), (384, 0.5)]  # the first is null
    assert logs.curve(evaluation.ppo_log(ptx=False), of["ptx_loss"]) == []
    assert logs.curve([{"step": 5, "loss": 2.5}, {"step": 6, "loss": float("nan")}], logs.SUPERVISED[0]) == [(5, 2.5)]


def test_samples_take_turns() -> None:
    assert samples.in_turn(["a", "a", "b", "c", "a"]) == [0, 2, 3, 1, 4]
    assert samples.in_turn([]) == []
    found = samples.side_by_side(evaluation.samples(), {"ppo": "PPO", "sft": "SFT"}, 0.0, 4)
    assert [sample["prompt"] for sample in found] == ["Prompt 0?", "Prompt 1?", "Prompt 2?", "Prompt 3?"]
    assert [answer["name"] for answer in found[0]["answers"]] == ["PPO", "SFT"]
    assert [answer["verdict"] for answer in found[1]["answers"]] == ["beats SFT", ""]


def test_charts_are_text_and_take_the_pages_colours() -> None:
    chart = charts.win_rates(evaluation.metrics())
    root = ElementTree.fromstring(chart.inline)
    shown = "".join(root.itertext())
    for model in evaluation.metrics()["models"].values():
        assert model["name"] in shown
    used = set(re.findall(r"var\(--([a-z-]+)", chart.inline))
    assert used <= set(THEME)
    assert {"ink", "gpt", "gpt-prompted", "sft", "ppo", "ppo-ptx", "best-of-n"} <= used
    bare = re.sub(r"var\([^)]*\)", "", chart.inline)
    assert re.findall(r"#[0-9a-f]{6}\b", bare) == []  # every colour follows the page's theme
    assert "prefers-color-scheme: dark" in chart.file
    assert charts.win_rates(evaluation.metrics()).inline == chart.inline


def test_where_a_mean_is_drawn_is_its_number() -> None:
    """The dots of the win-rate chart against the axis' own ticks."""
    root = ElementTree.fromstring(charts.win_rates(evaluation.metrics()).inline)
    svg = "{http://www.w3.org/2000/svg}"
    ticks = {}
    for group in root.iter(f"{svg}g"):
        if re.fullmatch(r"win_rates-xtick_\d+", group.get("id", "")):
            text = next(group.iter(f"{svg}text"))
            ticks[float(text.text)] = float(text.get("x"))
    width = ticks[1.0] - ticks[0.0]
    marked = [
        (float(use.get("x")) - ticks[0.0]) / width
        for group in root.iter(f"{svg}g")
        if re.match(r"win_rates-line2d", group.get("id", ""))
        for use in group.iter(f"{svg}use")
        if "--paper" not in (use.get("style") or "")
    ]
    for rate in evaluation.RATES.values():
        assert any(abs(mark - rate) < 1e-3 for mark in marked), rate


def test_text_in_a_chart_is_no_markup() -> None:
    chart = Chart("hostile", "hostile")
    with drawing(chart, 2) as (_, axes):
        axes.set_title("<script>alert(1)</script> $x$")
    assert "<script" not in chart.inline
    assert "<script>alert(1)</script> $x$" in "".join(ElementTree.fromstring(chart.inline).itertext())


def test_nothing_measured_draws_nothing() -> None:
    assert charts.every({}) == []
    assert charts.every({"table": {"columns": [], "rows": []}}) == []
