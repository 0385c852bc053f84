"""`instructrl estimate`: operations counted by hand and by torch, what does not fit, and what would make it fit."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Instructrl
from test_cli import HEAVY, cpu_seconds

from instructrl import estimate_memory, hardware, workload
from instructrl.config import Recipe
from instructrl.data_size import Amounts, amounts
from instructrl.estimate import estimate
from instructrl.hardware import GPUS
from instructrl.shapes import Shape, shape_of

SHAPE = Shape("gpt2", 10, 4, 2, 2, 2, 2, 16, 64, tied=True)
"""Each block has 4 x 12 + 4 x 4 + 4 x 16 + 16 x 4 = 192 weights in matrices; the head 40."""
AMOUNTS = Amounts(
    demonstrations=10,
    demonstration_prompt=3,
    demonstration=2,
    labelled=0,
    rankings=6,
    judged=5,
    ranked=4,
    answer=7,
    prompt=3,
    response=2,
    document=8,
    evaluated=9,
    said=(),
)
TEXT = {"data": {"text": [{"path": "text.txt"}]}}


def recipe(**sections: dict) -> Recipe:
    return Recipe.model_validate(TEXT | sections)


# ---- operations


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_forward_pass_has_the_operations_that_torch_counts(kind):
    """Of attention torch counts all of the square, of which a causal mask leaves half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4}}.get(kind) or {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(kind, vocab_size=50, **size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape, (rows, length) = shape_of(config.to_dict()), (2, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(rows, length, dtype=torch.long))
    tokens = rows * length
    square = workload.forward(shape, tokens, length) - workload.forward(shape, tokens, 0)
    assert counter.get_total_flops() == workload.forward(shape, tokens, length, tokens) + square


def test_operations_of_training_by_hand():
    tokens, length, predicted = 100, 5, 40
    blocks = 2 * 2 * 192 * tokens
    attention = 2 * 2 * 4 * length * tokens  # layers x width x length of Q K' and as much of P V, halved by the mask
    head = 2 * 40 * predicted
    forward = blocks + attention + head
    assert workload.forward(SHAPE, tokens, length, predicted) == forward
    assert workload.learning(recipe(), SHAPE, tokens, length, predicted) == 3 * forward
    again = recipe(runtime={"gradient_checkpointing": True})
    assert workload.learning(again, SHAPE, tokens, length, predicted) == 3 * forward + blocks + attention
    adapted = recipe(model={"lora": {"r": 2}})
    adapter = 2 * 2 * 2 * ((4 + 12) + (4 + 4) + (4 + 16) + (16 + 4)) * tokens
    assert workload.learning(adapted, SHAPE, tokens, length, predicted) == 2 * forward + 3 * adapter


def test_operations_of_ppo_ptx_by_hand():
    """Two iterations of 8 episodes of 3 + 2 tokens, two epochs, a document of 6 tokens an episode and epoch."""
    settings = {"total_episodes": 16, "batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2}
    settings |= {"ptx_ratio": 1, "ptx_max_length": 6, "response_length": 4}
    found = workload.work("ppo_ptx", recipe(ppo_ptx=settings, runtime={"generation_batch_size": 4}), SHAPE, AMOUNTS)

    def trunk(tokens, length):
        return tokens * (2 * 2 * 192 + 2 * 2 * 4 * length)

    tokens, written, read = 16 * 5, 16 * 2, 16 * 2 * 6
    head = 2 * 40 * written
    sampling, reference, critic_and_reward = trunk(tokens, 5) + head, trunk(tokens, 5) + head, 2 * trunk(tokens, 5)
    update = 2 * 3 * (trunk(tokens, 5) + head + trunk(tokens, 5))
    ptx = 3 * (trunk(read, 6) + 2 * 40 * read)
    assert found.flops == pytest.approx(sampling + reference + critic_and_reward + update + ptx)
    assert found.tokens == tokens * (1 + 3 + 2 * 2) + read
    assert found.steps == 2 * 2 * 4  # iterations, batches of 4, and the longest response decides
    weights = SHAPE.policy * 4
    assert found.step_bytes == weights + 4 * 5 * (2 * 2 * 4) * 4


def test_tokens_of_supervised_stages_by_hand():
    settings = recipe(sft={"epochs": 2}, reward_model={"epochs": 3}, ppo_init={"epochs": 2, "pretraining_share": 0.5})
    assert workload.work("sft", settings, SHAPE, AMOUNTS).tokens == 2 * 10 * 5
    assert workload.work("ppo_init", settings, SHAPE, AMOUNTS).tokens == 2 * 10 * 5 + 2 * 10 * 8
    assert workload.work("reward_model", settings, SHAPE, AMOUNTS).tokens == 3 * 6 * 4 * 10
    assert workload.work("judge", settings, SHAPE, AMOUNTS).tokens == 3 * 5 * 4 * 10


def test_disk_by_hand():
    settings = recipe(ppo={"snapshots": 2}, ppo_ptx={"ema_decay": 0}, eval={"weights": "last"})
    policy, scalar = 4 * SHAPE.policy, 4 * SHAPE.scalar
    assert workload.disk("sft", settings, SHAPE) == policy
    assert workload.disk("reward_model", settings, SHAPE) == scalar
    assert workload.disk("ppo", settings, SHAPE) == 4 * policy + scalar  # itself, its average, two snapshots; critic
    assert workload.disk("ppo_ptx", settings, SHAPE) == policy + scalar
    assert workload.checkpoints("sft", settings, SHAPE) == 2 * 3 * policy
    assert workload.checkpoints("ppo_ptx", settings, SHAPE) == 2 * 3 * (policy + scalar)


def test_several_processes_share_operations_and_batches_by_hand():
    """Two GPUs: half the time but for starting, half of each batch, and the gradients once more, in DDP's buckets."""
    settings = {"ppo_ptx": {"batch_size": 8, "num_mini_batches": 1, "total_episodes": 16, "response_length": 4}}
    settings |= {"sft": {"epochs": 2, "batch_size": 4}, "data": {"world": {}}, "eval": {"judge": "gold"}}
    runtimes = [{"num_processes": ranks, "micro_batch_size": 4} for ranks in (1, 2)]
    one, two = (Recipe.model_validate(settings | {"runtime": runtime}) for runtime in runtimes)
    gpu = GPUS["h100"]
    alone, shared = (
        {row.stage: row for row in estimate(settings, SHAPE, gpu).rows if row.stage in ("sft", "label", "ppo_ptx")}
        for settings in (one, two)
    )
    computing = [rows["sft"].seconds - workload.START for rows in (alone, shared)]
    assert computing[1] == pytest.approx(computing[0] / 2)
    assert alone["label"] == shared["label"]
    before, after = ({phase.name: phase.parts for phase in rows["sft"].phases} for rows in (alone, shared))
    assert after["forward"]["gradients in buckets"] == 4 * SHAPE.policy
    assert 2 * after["forward"]["activations"] == before["forward"]["activations"]
    before, after = ({phase.name: phase.parts for phase in rows["ppo_ptx"].phases} for rows in (alone, shared))
    assert after["step"]["gradients in buckets"] == 4 * (SHAPE.policy + SHAPE.scalar)
    assert 2 * after["rollout"]["logits"] == before["rollout"]["logits"]
    assert after["step"]["Adam's moments"] == before["step"]["Adam's moments"]


def test_processes_that_share_weights_hold_a_part_of_them():
    """And gather the policy to sample with it; nobody has buckets then."""
    runtimes = [{"num_processes": ranks, "sharding": "fsdp"} for ranks in (1, 4)]
    one, four = (
        {phase.name: phase.parts for phase in estimate_memory.phases("ppo_ptx", recipe(runtime=runtime), SHAPE, "cuda")}
        for runtime in runtimes
    )
    for part in ("policy", "critic", "reference", "reward model", "moving average", "Adam's moments", "gradients"):
        assert four["step"][part] == one["step"][part] // 4, part
    assert "gradients in buckets" not in four["step"]
    assert four["rollout"]["gathered weights"] == 4 * SHAPE.policy
    assert "gathered weights" not in one["rollout"]
    whole = estimate_memory.phases("eval", recipe(runtime=runtimes[1]), SHAPE, "cuda")[0]
    assert whole.parts["policy"] == 4 * SHAPE.policy


def test_each_stage_of_zero_shares_more():
    """DeepSpeed steps a copy of the weights, which is shared as the moments are, and saved by nobody."""
    weights, found = SHAPE.policy + SHAPE.scalar, {}
    for sharding in ("zero1", "zero2", "zero3"):
        settings = recipe(runtime={"num_processes": 4, "sharding": sharding})
        every = estimate_memory.phases("ppo_ptx", settings, SHAPE, "cuda")
        found[sharding] = {phase.name: phase.parts for phase in every}
        assert found[sharding]["step"]["Adam's moments"] == 8 * weights // 4
        assert found[sharding]["step"]["copy of the weights"] == 4 * weights // 4
        assert found[sharding]["step"]["gradients in buckets"] == 4 * weights
    gradients = [of["step"]["gradients"] for of in found.values()]
    assert gradients[0] // 4 == gradients[1] == gradients[2]
    assert ["gradients" in of["rollout"] for of in found.values()] == [False, False, True]
    policies = [of["step"]["policy"] for of in found.values()]
    assert policies[0] == policies[1] == 4 * SHAPE.policy
    assert policies[2] == SHAPE.policy
    gathered = ["gathered weights" in of["rollout"] for of in found.values()]
    assert gathered == [False, False, True]
    settings = [recipe(runtime={"num_processes": 4, "sharding": sharding}) for sharding in ("none", "zero2")]
    one, other = (workload.checkpoints("ppo_ptx", each, SHAPE) for each in settings)
    assert one == other


def test_processes_on_a_cpu_are_in_one_memory():
    one, two = (recipe(runtime={"device": "cpu", "num_processes": ranks}) for ranks in (1, 2))
    before, after = (
        {phase.name: phase.parts for phase in estimate_memory.phases("ppo", settings, SHAPE, "cpu")}
        for settings in (one, two)
    )
    assert after["step"]["policy"] == 2 * before["step"]["policy"]
    assert after["step"]["libraries"] == 2 * before["step"]["libraries"]


# ---- data


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_counted_by_their_beginning(tmp_path, packed):
    rows = [{"prompt": "p" * 400, "responses": ["r" * 80, "s" * 120], "ranks": [1, 2]} for _ in range(3000)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = tmp_path / ("rankings.jsonl.gz" if packed else "rankings.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps({"prompt": "p" * 40, "response": "r" * 20}) + "\n")
    sources = {"rankings": [{"path": str(file)}], "demonstrations": [{"path": str(demonstrations)}]}
    shares = {"valid_share": 0, "valid_ranking_share": 0.2, "judge_ranking_share": 0.3}
    found = amounts(recipe(data=sources | shares | TEXT["data"]), shape_of({"model_type": "gpt2"}))
    assert found.rankings == pytest.approx(1500, rel=0.05)
    assert found.judged == pytest.approx(900, rel=0.05)
    assert (found.prompt, found.answer, found.ranked) == (100, 25, 2)
    assert found.demonstrations == pytest.approx(1, abs=0.1)
    assert any(said.startswith(file.name) and "by a sample of it" in said for said in found.said)


# ---- the command


def test_it_says_what_a_recipe_takes(instructrl: Instructrl):
    shown = instructrl("estimate", "recipe=gpt2-small", "--on", "h100")
    assert shown.code == 0, shown.err
    assert "124,439,808 parameters" in shown.out
    for stage in ("sft", "ppo_init", "reward_model", "ppo_ptx", "eval", "all"):
        assert re.search(rf"^ {stage} ", shown.out, re.MULTILINE), stage
    assert re.search("of which 1[78]% are assumed", shown.out)
    found = json.loads(instructrl("estimate", "recipe=gpt2-small", "--on", "h100", "--json").out)
    assert found["fits"]
    assert found["peak"]["bytes"] == max(phase["bytes"] for row in found["stages"] for phase in row["phases"])
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["stages"]))
    assert {phase["phase"] for row in found["stages"] if row["stage"] == "ppo_ptx" for phase in row["phases"]} >= {
        "rollout",
        "scoring",
        "ptx",
        "update of the policy",
        "update of the critic",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe=gpt2-small", "--on", "l4"],
        ["recipe=gpt2-small", "runtime.max_tokens=65536", "runtime.micro_batch_size=8", "--on", "l4"],
        ["recipe=gpt2-xl", "--on", "h100"],
        ["recipe=gpt2-xl", "runtime=eight-gpus", "runtime.sharding=none", "--on", "h100"],
        ["recipe=llama-1b", "--on", "a100-40gb"],
        ["recipe=llama-1b", "runtime.num_processes=8", "runtime.rollouts=vllm", "--on", "a100-40gb"],
        ["recipe=gpt2-xl", "runtime.num_processes=8", "--on", "a100-40gb"],
        ["recipe=llama-1b", "--on", "l40s"],
        ["recipe=tldr-pythia-1b", "--on", "a100-40gb"],
    ],
    ids=" ".join,
)
def test_what_cannot_fit_is_refused_and_fits_with_the_keys_that_are_named(instructrl: Instructrl, arguments):
    refused = instructrl("estimate", *arguments)
    assert refused.code == 2
    [sentence] = refused.err.splitlines()
    keys = re.search(r": set (.+) \(it then takes ([\d.]+) GB\)\.$", sentence)
    assert keys, sentence
    found = instructrl("estimate", *arguments, *shlex.split(keys[1]), "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["peak"]["bytes"] / 1e9 == pytest.approx(float(keys[2]), abs=0.6)


def test_what_fits_nowhere_says_so(instructrl: Instructrl, tmp_path: Path):
    model = tmp_path / "large"
    model.mkdir()
    size = {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128_256, **size}))
    refused = instructrl("estimate", "recipe=llama-8b-lora", f"model.path={model}", "--on", "h100")
    assert refused.code == 2
    assert refused.err.endswith("no key of the recipe makes it fit; it needs a smaller model.\n")
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "h10"], "--on h10: nothing is known of it. Did you mean h100?"),
        (["--on", "a100"], "--on a100: nothing is known of it. Did you mean a100-80gb or a100-40gb?"),
        (["model.path=./nowhere", "runtime.device=cpu"], "model.path=./nowhere: there is no such folder"),
        ([], "runtime.device=cuda: this machine has no CUDA device"),
    ],
)
def test_mistakes_are_told_in_a_sentence(instructrl: Instructrl, monkeypatch, arguments, said):
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    wrong = instructrl("estimate", "recipe=gpt2-small", "runtime.offline=true", *arguments)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert said in wrong.err


def test_a_gpu_is_known_by_what_nvidia_smi_says(tmp_path, monkeypatch):
    for said, name, memory in (
        ("NVIDIA H100 80GB HBM3, 81559", "h100", 81_559),
        ("NVIDIA A100-SXM4-40GB, 40960", "a100-40gb", 40_960),
        ("NVIDIA GeForce RTX 4090, 24564", "rtx-4090", 24_564),
        ("NVIDIA L40S, 46068", "l40s", 46_068),
        ("NVIDIA RTX 6000 Ada Generation, 49140", "NVIDIA RTX 6000 Ada Generation, as fast as a100-80gb here", 49_140),
    ):
        found = hardware.like(said)
        assert (found.name, found.memory) == (name, memory * 2**20)


def test_it_is_quick_and_imports_nothing_heavy(here: Path):
    arguments = ["instructrl", "estimate", "recipe=gpt2-xl", "--on", "l4"]
    script = (
        f"import sys\nfrom instructrl import cli\nsys.argv, code = {arguments!r}, 0\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    code = end.code\nassert code == 2\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy\n"
    )
    assert cpu_seconds("-c", script) < 2


def test_a_plan_has_a_line_on_memory(instructrl: Instructrl, monkeypatch):
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    assert re.search(
        r"^Memory: about \d+ MB at most, in \w+ \(.+\); this machine has", instructrl("plan").out, re.MULTILINE
    )
    large = instructrl("plan", "recipe=llama-1b").out
    assert re.search(r"^Memory: about \d+ GB at most, in \w+ \(.+\), of a GPU, which this machine", large, re.MULTILINE)
    monkeypatch.setattr(hardware, "gpu", lambda: hardware.GPUS["l4"])
    assert "and this machine has 24 GB; `instructrl estimate` says" in instructrl("plan", "recipe=llama-1b").out


def test_a_plan_says_nothing_of_a_model_that_is_not_known(instructrl: Instructrl, here: Path):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text('{"model_type": "t5"}')
    planned = instructrl("plan", "recipe=gpt2-small", "model.path=./model")
    assert planned.code == 0
    assert "Memory" not in planned.out
