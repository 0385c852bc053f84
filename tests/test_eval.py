"""The whole evaluation on small random models made here: every number against a plain computation of it."""

import json
import math
import shutil

import numpy as np
import pytest
import test_ranks
import torch
from chat_server import serving
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from instructrl.config import Recipe, Source
from instructrl.errors import StageFailed, UserError
from instructrl.stages import answers, benchmarks, data, judging, models, numbers, ratings, report, study, trajectory
from instructrl.stages import eval as stage
from instructrl.stages.contract import Contract
from instructrl.stages.length_control import length_controlled
from instructrl.stages.pretrain import make_tokenizer
from instructrl.stages.tables import read_table
from instructrl.stages.winrate import share
from instructrl.trainers.rollout import generate, score_rewards
from instructrl.world import Prompt, make_world

SIZES = {"documents": 300, "valid_documents": 30, "demonstrations": 60, "ranked_prompts": 40}
SIZES |= {"valid_ranked_prompts": 20, "ppo_prompts": 60, "eval_prompts": 40}
EVAL = {
    "weights": "last",
    "judge": "gold",
    "num_prompts": 24,
    "response_length": 12,
    "bootstrap_samples": 200,
    "samples_shown": 5,
}
MODELS = ("pretrain", "sft", "ppo", "ppo_ptx")


def llama(tokenizer, kind, seed, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **special, **options)
    config.initializer_range = 0.2  # so that the models differ
    return kind(config).eval()


def make_inputs(folder, recipe):
    """Artifacts as the stages leave them, with random weights."""
    (folder / "data").mkdir(parents=True)
    data.run("data", recipe, {}, folder / "data")
    texts = [row["text"] for row in read_table(folder / "data" / "text.train.parquet")]
    contract = Contract(make_tokenizer(texts, 400), recipe.model.template)
    inputs = {"data": folder / "data"}
    for seed, name in enumerate(MODELS):
        llama(contract.tokenizer, LlamaForCausalLM, seed).save_pretrained(folder / name / "model")
        contract.save(folder / name / "model")
        inputs[name] = folder / name
    for seed, name in enumerate(("reward_model", "judge"), 10):
        model = llama(contract.tokenizer, LlamaForSequenceClassification, seed, num_labels=1)
        model.config.reward_bias = 0.25
        models.save(model, contract, folder / name / "model")
        inputs[name] = folder / name
    return inputs


@pytest.fixture(scope="module")
def world_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    recipe = Recipe(name="small", model={"path": None}, data={"world": SIZES}, eval=EVAL | {"best_of_n": 4})
    inputs = make_inputs(folder, recipe)
    for iteration, name in ((250, "sft"), (400, "ppo_ptx")):  # as PPO passes through them
        shutil.copytree(inputs[name] / "model", inputs["ppo"] / "snapshots" / f"{iteration:06d}")
    (folder / "eval").mkdir()
    found = stage.run("eval", recipe, inputs, folder / "eval")
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    rows = read_table(folder / "eval" / "samples.parquet")
    return recipe, inputs, folder / "eval", found, metrics, rows


def of(rows, model, temperature):
    return [row for row in rows if row["model"] == model and row["temperature"] == temperature]


def test_every_model_answers_the_same_prompts_at_both_temperatures(world_run):
    *_, rows = world_run
    assert len(rows) == 5 * 2 * 24 + 24
    prompts = [row["prompt"] for row in of(rows, "sft", 1.0)]
    assert len(set(prompts)) == 24
    for model in judging.NAMES:
        for temperature in (1.0, 0.0):
            assert [row["prompt"] for row in of(rows, model, temperature)] == prompts


def test_win_rates_are_those_of_the_gold_preference(world_run):
    recipe, inputs, _, _, metrics, rows = world_run
    world = make_world(recipe.data.world, recipe.seed)
    specs = {row["prompt"]: row["spec"] for row in read_table(inputs["data"] / "prompts.eval.parquet")}
    for temperature, key in ((1.0, "win_rate"), (0.0, "win_rate_greedy")):
        utility = {}
        for row in rows:
            prompt = Prompt.from_json(specs[row["prompt"]])
            judged = world.judge(prompt, row["response"], row["ended"])
            utility[row["model"], row["temperature"], row["prompt"]] = judged.utility
        for model in judging.NAMES:
            points = 0.0
            for prompt in {row["prompt"] for row in rows}:
                ours, theirs = (utility[name, temperature, prompt] for name in (model, "sft"))
                points += 1.0 if ours > theirs + 1e-6 else 0.5 if abs(ours - theirs) <= 1e-6 else 0.0
            mean, low, high = metrics["models"][model][key]
            assert mean == pytest.approx(points / 24)
            assert 0 <= low <= mean <= high <= 1
    assert metrics["models"]["sft"]["win_rate"] == [0.5, 0.5, 0.5]


def test_every_model_is_compared_with_every_other(world_run):
    _, _, folder, _, metrics, rows = world_run
    matrix = metrics["matrix"]
    assert list(matrix) == [*judging.NAMES, "best_of_n"]
    scores = {(row["model"], row["prompt"]): row["judge_score"] for row in rows if row["temperature"] == 1.0}
    prompts = {row["prompt"] for row in rows}
    for one, against in matrix.items():
        assert set(against) == set(matrix) - {one}
        for other, (mean, low, high) in against.items():
            gaps = [scores[one, prompt] - scores[other, prompt] for prompt in prompts]
            assert mean == pytest.approx(np.mean([0.5 if abs(gap) <= 1e-6 else float(gap > 0) for gap in gaps]))
            assert 0 <= low <= mean <= high <= 1
            assert matrix[other][one] == pytest.approx([1 - mean, 1 - high, 1 - low])
    assert matrix["ppo"]["sft"] == metrics["models"]["ppo"]["win_rate"]
    printed = (folder / "report.md").read_text()
    assert "| PPO-ptx | " in printed.partition("## Win rates of all pairs")[2].partition("##")[0]


def test_win_rates_at_equal_length_are_of_these_answers(world_run):
    _, _, folder, _, metrics, rows = world_run
    for name in ("gpt", "ppo", "best_of_n"):
        ours, theirs = of(rows, name, 1.0), of(rows, "sft", 1.0)
        lengths = [[row["tokens"] for row in found] for found in (ours, theirs)]
        expected = length_controlled([row["against_sft"] for row in ours], *lengths, samples=200)
        assert metrics["models"][name]["win_rate_length_controlled"] == pytest.approx(list(expected))
    assert "win_rate_length_controlled" not in metrics["models"]["sft"]
    section = (folder / "report.md").read_text().partition("## Win rates at equal length")[2].partition("##")[0]
    assert section.count("\n| ") == 7  # a head, its line and five models


def test_win_rates_by_use_case_are_those_of_its_samples(world_run):
    _, inputs, folder, _, metrics, rows = world_run
    categories = {row["prompt"]: row["category"] for row in read_table(inputs["data"] / "prompts.eval.parquet")}
    assert all(row["category"] == categories[row["prompt"]] for row in rows)
    cases = metrics["use_cases"]
    assert sum(case["prompts"] for case in cases.values()) == 24
    assert len(cases) > 3
    for name, case in cases.items():
        outcomes = [row["against_sft"] for row in of(rows, "ppo", 1.0) if row["category"] == name]
        assert case["prompts"] == len(outcomes)
        assert case["win_rate"]["ppo"][0] == pytest.approx(np.mean(outcomes))
    columns = ["use case", "prompts", "GPT", "GPT (prompted)", "PPO", "PPO-ptx", "SFT, best of 4"]
    assert metrics["use_case_table"]["columns"] == columns
    printed = (folder / "report.md").read_text()
    assert "## Win rates by use case" in printed
    assert all(f"| {report.cell(name)} | {case['prompts']} |" in printed for name, case in cases.items())


def test_a_model_of_another_contract_is_refused(world_run, tmp_path):
    recipe, inputs, folder, *_ = world_run
    contract = Contract.load(folder.parent / "sft" / "model")
    assert json.loads((folder / "contract.json").read_text()) == contract.card
    shutil.copytree(inputs["reward_model"], tmp_path / "other")
    Contract(contract.tokenizer, "Q: {prompt}").save(tmp_path / "other" / "model")
    with pytest.raises(UserError, match="reward_model was made under another text contract than sft: token"):
        stage.run("eval", recipe, inputs | {"reward_model": tmp_path / "other"}, tmp_path)


def test_rewards_are_the_reward_models_less_its_bias(world_run):
    _, inputs, _, _, metrics, rows = world_run
    contract = Contract.load(inputs["sft"] / "model")
    model = LlamaForSequenceClassification.from_pretrained(inputs["reward_model"] / "model").eval()
    for name in ("gpt", "gpt_prompted", "ppo"):
        for row in of(rows, name, 1.0)[:4]:
            response = contract.response(row["response"]) if row["ended"] else contract.response(row["response"])[:-1]
            ids = contract.prompt(row["prompt"]) + response
            if (
                name != "gpt_prompted"
                and contract.decode(ids[len(contract.prompt(row["prompt"])) :]) != row["response"]
            ):
                continue
            with torch.no_grad():
                scores = model.score(model.model(torch.tensor([ids])).last_hidden_state)
            if len(response) - row["ended"] == row["tokens"]:  # sampled ids are those of the text
                assert row["reward"] == pytest.approx(float(scores[0, -1, 0]) - 0.25, abs=1e-4)
    rewards = [row["reward"] for row in of(rows, "ppo", 1.0)]
    assert metrics["models"]["ppo"]["reward"][0] == pytest.approx(np.mean(rewards))


def test_kl_is_the_log_ratio_of_the_answers(world_run):
    recipe, inputs, _, _, metrics, rows = world_run
    done = study.Study(recipe, inputs, world_run[2])
    for name in judging.NAMES:
        done.read(name)
    policies = [LlamaForCausalLM.from_pretrained(inputs[name] / "model").eval() for name in ("ppo", "sft")]
    pad = done.pad
    for number in range(4):
        prompt, answer = done.prompts[number]["ids"], done.answers["ppo"][1.0][number]
        ids = torch.tensor([prompt + answer.ids])
        terms = []
        for policy in policies:
            with torch.no_grad():
                logits = policy(ids).logits[0, len(prompt) - 1 : -1]
            logits[:, pad] = -math.inf
            terms.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())
        assert of(rows, "ppo", 1.0)[number]["kl_from_sft"] == pytest.approx(float(terms[0] - terms[1]), abs=1e-3)
    assert metrics["models"]["sft"]["kl"] == [0, 0, 0]
    assert metrics["models"]["ppo"]["kl"][0] > 0
    assert metrics["models"]["gpt"]["kl"] is None


def test_the_best_of_n_is_by_reward(world_run):
    """Against sampling and scoring the same four answers one after the other."""
    recipe, inputs, folder, _, metrics, rows = world_run
    done = study.Study(recipe, inputs, folder)
    ids = [row["ids"] for row in done.prompts]
    policy, reward_model = done.model("sft"), models.load_reward_model(inputs["reward_model"] / "model", recipe)[0]
    settings = answers.sampling(done.contract, recipe)  # one generator for the four
    highest = [-math.inf] * 24
    for _ in range(4):
        for number, completion in enumerate(generate(policy, ids, temperature=1.0, **settings)):
            score = score_rewards(reward_model, [ids[number] + completion.ids], pad_token_id=done.pad, max_tokens=512)
            highest[number] = max(highest[number], float(score) - 0.25)
    best, first = (of(rows, name, 1.0) for name in ("best_of_n", "sft"))
    assert [row["reward"] for row in best] == pytest.approx(highest, abs=1e-4)
    assert all(one["reward"] >= other["reward"] - 1e-6 for one, other in zip(best, first, strict=True))
    assert any(one["reward"] > other["reward"] for one, other in zip(best, first, strict=True))
    assert not of(rows, "best_of_n", 0.0)
    assert {row["kl_from_sft"] for row in best} == {None}
    found = metrics["models"]["best_of_n"]
    assert found["kl_bound"] == pytest.approx(math.log(4) - 0.75)
    assert found["tasks"] == metrics["models"]["sft"]["tasks"]
    assert found["win_rate"][0] == pytest.approx(np.mean([row["against_sft"] for row in best]))
    [line] = [row for row in metrics["table"]["rows"] if row[0] == "SFT, best of 4"]
    assert dict(zip(metrics["table"]["columns"], line, strict=True))["KL from SFT"] == "<= 0.64"
    printed = (folder / "report.md").read_text()
    assert "SFT, best of 4: of so many answers of SFT's, the one with the highest reward." in printed
    assert "SFT, best of 4 (" in printed  # among the samples


def test_the_curve_is_what_the_same_weights_do_as_models(world_run):
    """The first snapshot is SFT and the second PPO-ptx, so that each row is known from the models' own numbers."""
    _, _, folder, _, metrics, rows = world_run
    found, models_ = metrics["overoptimisation"], metrics["models"]
    assert found["judge"] == "gold"
    assert list(found["policies"]) == ["ppo"]
    curve = found["policies"]["ppo"]
    assert [row["step"] for row in curve] == [250, 400, 500]
    assert [row["episodes"] for row in curve] == [128_000, 204_800, 256_000]
    for row, name in zip(curve, ("sft", "ppo_ptx", "ppo"), strict=True):
        assert row["proxy"] == pytest.approx(models_[name]["reward"], abs=1e-5)
        assert row["judge"] == pytest.approx(models_[name]["gold"]["utility"])
        rate = models_[name]["win_rate"] if name != "sft" else list(share([0.5] * 24, 200))  # measured, here
        assert row["win_rate"] == pytest.approx(rate)
        assert row["kl"] == pytest.approx(models_[name]["kl"][0], abs=1e-3)
        assert row["length"] == pytest.approx(models_[name]["length"][0])
    best = max(curve, key=lambda row: row["judge"][0])
    assert found["best_by_judge"] == {"ppo": best["step"]}
    assert found["lost_since_best"]["ppo"][0] == pytest.approx(best["judge"][0] - curve[-1]["judge"][0])
    assert "**Best PPO by the judge:" in (folder / "report.md").read_text()
    one, *_, four = found["best_of_n"]
    assert [row["n"] for row in found["best_of_n"]] == [1, 2, 4]
    assert four["proxy"] == pytest.approx(models_["best_of_n"]["reward"], abs=1e-5)
    assert four["judge"][0] == pytest.approx(models_["best_of_n"]["gold"]["utility"][0], abs=0.05)  # ties
    drawn = json.loads((folder / "checkpoints" / "best_of_n.json").read_text())["drawn"]
    assert one["proxy"][0] == pytest.approx(np.mean(drawn["proxy"]))
    first = of(rows, "sft", 1.0)
    assert drawn["proxy"][0] == pytest.approx([row["reward"] for row in first], abs=1e-5)
    assert drawn["judge"][0] == pytest.approx([json.loads(row["gold"])["utility"] for row in first])


def test_the_curve_ends_with_the_last_weights_where_the_average_answers(world_run, tmp_path):
    recipe, inputs, *_ = world_run
    chosen = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"weights": "ema"})})
    found = trajectory.pieces(study.Study(chosen, inputs, tmp_path))
    assert list(found) == ["ppo@000250", "ppo@000400", "ppo@000500"]
    assert found["ppo@000500"] == inputs["ppo"] / "model"


def test_the_scorecard_has_this_runs_numbers(world_run):
    """24 prompts, and tasks of more than ten questions; the stages here left no numbers of the reward model."""
    _, _, folder, _, metrics, _ = world_run
    rows = {row["text"]: row for row in metrics["scorecard"]}
    for name, title in (("gpt", "GPT"), ("ppo_ptx", "PPO-ptx")):
        yours = rows[f"{title} against SFT: win rate"]["yours"]
        assert (yours["number"], yours["n"]) == (metrics["models"][name]["win_rate"], 24)
    lost = rows["PPO loses what GPT knew on a public task: difference"]["yours"]
    task = lost["note"].removeprefix("on ")
    assert lost["number"] == metrics["tax"]["tasks"][task]["ppo - gpt"]
    assert lost["n"] == metrics["tax"]["questions"][task] > 10
    assert rows["The reward model predicts its labelers' choices: accuracy"]["verdict"] == "not measured"
    assert "## Paper versus you" in (folder / "report.md").read_text()


def test_a_recipe_chooses_the_weights(world_run, tmp_path):
    """PPO's average lies beside its last weights; SFT and the base model have one set."""
    recipe, inputs, *_ = world_run
    contract = Contract.load(inputs["sft"] / "model")
    for number, name in enumerate(("ppo", "ppo_ptx")):
        shutil.copytree(inputs[name] / "model", tmp_path / name / "model")
        models.save(llama(contract.tokenizer, LlamaForCausalLM, 20 + number), contract, tmp_path / name / "ema")
    inputs = inputs | {name: tmp_path / name for name in ("ppo", "ppo_ptx")}
    for weights, folder in (("last", "model"), ("ema", "ema")):
        chosen = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"weights": weights})})
        work = study.Study(chosen, inputs, tmp_path)
        for name, place in (("gpt", "pretrain/model"), ("sft", "sft/model"), ("ppo", folder), ("ppo_ptx", folder)):
            path = inputs[name] / place if name in ("ppo", "ppo_ptx") else inputs[place.split("/")[0]] / "model"
            expected = LlamaForCausalLM.from_pretrained(path)
            assert torch.equal(work.model(name).lm_head.weight, expected.lm_head.weight), (weights, name)


def test_the_report_says_what_the_policies_are(world_run):
    _, _, folder, _, metrics, _ = world_run
    assert (metrics["weights"], metrics["references"]) == ("last", {"ppo": "ppo_init", "ppo_ptx": "ppo_init"})
    printed = (folder / "report.md").read_text()
    assert "PPO and PPO-ptx started from, and paid for KL from, `ppo_init` and not SFT" in printed
    assert "moving average" not in printed
    other = metrics | {"weights": "ema", "references": {"ppo": "ppo_init", "ppo_ptx": "sft"}}
    notes = report.policy_notes(other)
    assert notes[0] == "PPO and PPO-ptx answer with the moving average of their weights (App. C.4)."
    assert notes[1].startswith("PPO started from,")
    assert len(report.policy_notes(other | {"weights": "last", "references": {}, "models": {}})) == 0


def test_choices_go_by_mean_log_probability(world_run):
    """Against one forward pass a choice."""
    _, inputs, *_ = world_run
    contract = Contract(Contract.load(inputs["sft"] / "model").tokenizer, "{prompt}")
    model = LlamaForCausalLM.from_pretrained(inputs["sft"] / "model").eval()
    pad = contract.tokenizer.pad_token_id
    contexts = ["Mia lives in", "x", "The red cup is in the"]
    choices = [
        [" a", " b", " the town of the people"],
        [" one two", " one three", " one"],
        [" cup.", " bag and the dog"],
    ]
    questions = [
        (contract.prompt(context), [contract.response(choice)[:-1] for choice in listed])
        for context, listed in zip(contexts, choices, strict=True)
    ]
    expected = []
    for context, listed in questions:
        for choice in listed:
            with torch.no_grad():
                logits = model(torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
            logits[:, pad] = -math.inf
            expected.append(float(logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).mean()))
    for max_tokens in (1, 64, 4096):
        found = benchmarks.choice_scores(model, questions, pad, max_tokens)
        assert [score for scores in found for score in scores] == pytest.approx(expected, abs=1e-5)


def test_text_losses_are_cross_entropy(world_run):
    _, inputs, *_ = world_run
    contract = Contract.load(inputs["sft"] / "model")
    model = LlamaForCausalLM.from_pretrained(inputs["sft"] / "model").eval()
    rows = [{"text": "The cup is red."}, {"text": "One"}, {"text": "A dog. " * 100}]
    documents = [contract.document(row["text"])[:64] for row in rows]
    found = benchmarks.text_losses(model, documents, contract.tokenizer.pad_token_id, 4096)
    for document, (loss, tokens) in zip(documents, found, strict=True):
        ids = torch.tensor([document])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        logits[:, contract.tokenizer.pad_token_id] = -math.inf
        assert tokens == ids.shape[1] - 1
        assert loss == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), rel=1e-4
        )


def test_public_tasks_and_text_are_measured_and_their_changes_paired(world_run):
    _, _, _, _, metrics, _ = world_run
    tasks = metrics["models"]["gpt"]["tasks"]
    assert set(tasks) == {"facts", "dictionary", "reading", "sums", "stories"}
    for model in ("gpt", "sft", "ppo", "ppo_ptx"):
        average = metrics["models"][model]["tasks_average"][0]
        assert average == pytest.approx(np.mean([found[0] for found in metrics["models"][model]["tasks"].values()]))
    for task, found in metrics["tax"]["tasks"].items():
        expected = metrics["models"]["ppo"]["tasks"][task][0] - metrics["models"]["gpt"]["tasks"][task][0]
        assert found["ppo - gpt"][0] == pytest.approx(expected)
    losses = {model: found["text_loss_all"][0] for model, found in metrics["models"].items()}
    assert metrics["tax"]["text_loss"]["all"]["ppo_ptx - ppo"][0] == pytest.approx(losses["ppo_ptx"] - losses["ppo"])


def test_the_prompted_model_reads_a_prefix_and_stops_at_the_newline(world_run):
    _, _, _, _, metrics, rows = world_run
    prefix = metrics["prefix"]
    assert prefix["chosen"] == max(prefix["rewards"], key=prefix["rewards"].get)
    assert len(prefix["rewards"]) == answers.PREFIXES
    assert all("\n" not in row["response"] for row in rows if row["model"] == "gpt_prompted")


def test_stop_tokens_are_all_that_contain_the_stop():
    tokenizer = make_tokenizer(["one.\n\ntwo.\n\n" * 50], 300)
    found = answers.stop_tokens(Contract(tokenizer), "\n")
    assert len(found) > 1
    assert {number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])} == set(found)


def test_an_interrupted_evaluation_does_not_ask_again(world_run, tmp_path, monkeypatch):
    recipe, inputs, folder, _, metrics, _ = world_run
    (tmp_path / "checkpoints").mkdir()
    for name in ("gpt", "gpt_prompted", "sft"):
        (tmp_path / "checkpoints" / f"{name}.json").write_bytes((folder / "checkpoints" / f"{name}.json").read_bytes())
    (tmp_path / "checkpoints" / "ppo.tmp").write_text('{"answers": {"1.0": [')  # killed while it was written
    shutil.copy(folder / "checkpoints" / "ppo@000400.json", tmp_path / "checkpoints")
    asked, answered = [], trajectory.answered
    monkeypatch.setattr(trajectory, "answered", lambda self, path: asked.append(path.name) or answered(self, path))
    ask = study.Study._ask
    monkeypatch.setattr(study.Study, "_ask", lambda self, name: asked.append(name) or ask(self, name))
    stage.run("eval", recipe, inputs, tmp_path)
    assert asked == ["ppo", "ppo_ptx", "000250"]
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again == metrics


def evaluate(rank, port, threads, recipe, inputs, folder):
    test_ranks.be_a_rank(rank, port)
    torch.set_num_threads(threads)
    found = stage.run("eval", recipe, inputs, folder)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_find_what_one_does(world_run, tmp_path):
    """Each asks some of the models; the answers, and so all numbers, are the same to the bit."""
    recipe, inputs, folder, found, metrics, _ = world_run
    arguments = (test_ranks.free_port(), torch.get_num_threads(), recipe, inputs, tmp_path)
    torch.multiprocessing.spawn(evaluate, arguments, nprocs=2)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "samples.parquet").read_bytes() == (folder / "samples.parquet").read_bytes()
    assert [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)] == [found, {}]
    asked = sorted(path.name for path in (folder / "checkpoints").glob("*.json"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.json")) == asked


def test_the_table_is_for_the_terminal(world_run):
    _, _, _, found, metrics, _ = world_run
    table = metrics["table"]
    assert found["ppo_win_rate"] == pytest.approx(metrics["models"]["ppo"]["win_rate"][0], abs=1e-4)
    assert found["claims_hold"] + found["claims_fail"] + found["claims_undecided"] == len(metrics["claims"])
    assert [row[0] for row in table["rows"]] == [*judging.NAMES.values(), "SFT, best of 4"]
    assert all(
        len(row) == len(table["columns"]) and all(isinstance(cell, str) for cell in row) for row in table["rows"]
    )
    assert "gold preference" in table["notes"][0]
    json.dumps(found, allow_nan=False)


def test_prompts_that_are_too_long(world_run, tmp_path):
    recipe, inputs, *_ = world_run
    short = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_prompt_tokens": 2})})
    with pytest.raises(UserError, match=r"none of the 40 prompts of prompts\.eval has at most 2 tokens"):
        stage.run("eval", short, inputs, tmp_path)


# ---- other judges


def user_recipe(folder, **settings):
    questions = [f"What comes after {n}?" for n in range(120)]
    rows = {
        "d": [{"prompt": text, "response": f"{n + 1}."} for n, text in enumerate(questions[:60])],
        "r": [{"prompt": text, "chosen": f"{n + 1}", "rejected": f"{n}"} for n, text in enumerate(questions)],
        "t": [{"text": f"After {n} comes {n + 1}."} for n in range(60)],
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    paths = {name: ({"path": str(folder / f"{name}.jsonl")},) for name in rows}
    sources = {"demonstrations": paths["d"], "rankings": paths["r"], "text": paths["t"]}
    return Recipe(model={"path": None}, data=sources, eval=EVAL | settings)


def test_a_learnt_judge(tmp_path):
    recipe = user_recipe(tmp_path, judge="reward_model", temperature=0.0)
    inputs = make_inputs(tmp_path, recipe)
    (tmp_path / "eval").mkdir()
    stage.run("eval", recipe, inputs, tmp_path / "eval")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    rows = read_table(tmp_path / "eval" / "samples.parquet")
    assert {row["temperature"] for row in rows} == {0.0}
    assert len({row["reward"] for row in rows} & {row["judge_score"] for row in rows}) == 0  # another model
    ours, theirs = ([row["judge_score"] for row in of(rows, name, 0.0)] for name in ("ppo", "sft"))
    points = [0.5 if abs(a - b) <= 1e-6 else float(a > b) for a, b in zip(ours, theirs, strict=True)]
    assert metrics["models"]["ppo"]["win_rate"][0] == pytest.approx(np.mean(points))
    assert metrics["models"]["ppo"]["kl"] is None  # greedy answers are no sample
    assert "gold" not in metrics["models"]["ppo"]
    report = (tmp_path / "eval" / "report.md").read_text()
    assert "a second reward model, trained on rankings of prompts that trained nothing else" in report
    assert metrics["use_cases"] == {}
    assert "use case" not in report
    assert metrics["overoptimisation"]["policies"] == {}
    assert "Greedy answers have no KL" in report


def test_an_endpoint_judges_and_a_resumed_evaluation_pays_nothing_twice(world_run, tmp_path, monkeypatch):
    recipe, inputs, folder, *_ = world_run

    def first_letters(prompt, first, second):
        """Stable whatever the place."""
        return f"Verdict: {'A' if first < second else 'B'}"

    with serving(first_letters) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        calls = {"backoff": 0.01, "retries": 0}
        recipe = Recipe.model_validate(
            recipe.model_dump()
            | {"runtime": {"output_dir": str(tmp_path), "endpoint": calls}}
            | {"eval": recipe.eval.model_dump() | {"judge": "endpoint", "endpoint": {"model": "a-judge"}}}
        )
        shutil.copytree(folder / "checkpoints", tmp_path / "eval.partial" / "checkpoints")
        server.answer = lambda *parts: 503 if len(server.asked) > 60 else first_letters(*parts)
        with pytest.raises(StageFailed, match="The replies so far are kept"):
            stage.run("eval", recipe, inputs, tmp_path / "eval.partial")
        server.answer = first_letters
        stage.run("eval", recipe, inputs, tmp_path / "eval.partial")
        asked = [json.dumps(body["messages"]) for body in server.asked]
        failed = server.failed
    metrics = json.loads((tmp_path / "eval.partial" / "metrics.json").read_text())
    rows = read_table(tmp_path / "eval.partial" / "samples.parquet")
    card = metrics["judge_card"]
    assert card["cached"] >= 60
    assert card["calls"] == len(asked) - failed  # of both attempts
    assert len(asked) - len(set(asked)) == failed
    for name in ("gpt", "ppo", "best_of_n"):
        ours, theirs = of(rows, name, 1.0), of(rows, "sft", 1.0)
        both = [(a["response"], b["response"]) for a, b in zip(ours, theirs, strict=True)]
        points = [0.5 if a == b else float(a < b) for a, b in both]
        assert [row["against_sft"] for row in ours] == points
        assert metrics["models"][name]["win_rate"][0] == pytest.approx(np.mean(points))
        assert metrics["models"][name]["verdicts"] == 24
    assert not card["position_biased"]
    assert all("sft" in (one, *against) for one, against in metrics["matrix"].items())
    assert "win_rate_greedy" not in metrics["models"]["ppo"]
    report = (tmp_path / "eval.partial" / "report.md").read_text()
    assert "the model a-judge behind an endpoint" in report
    assert "## The judge" in report


LABELS = [
    {"prompt": "p1", "model_a": "PPO", "model_b": "SFT", "winner": "a"},
    {"prompt": "p2", "model_a": "sft", "model_b": "ppo", "winner": "model_b"},
    {"prompt": "p3", "model_a": "ppo", "model_b": "sft", "winner": "tie"},
    {"prompt": "p4", "model_a": "ppo", "model_b": "sft", "winner": "SFT"},
    {"prompt": "p4", "model_a": "GPT (prompted)", "model_b": "sft", "winner": "b"},
    {"prompt": "p4", "model_a": "gpt", "model_b": "ppo", "winner": "b"},
]


def labels(folder, rows):
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    without_text = {"ppo_init": {"pretraining_share": 0}, "ppo_ptx": {"ptx_coef": 0}}
    return Recipe(eval={"judge": "labels", "labels": {"path": str(path)}}, **without_text)


def test_labels_by_hand(tmp_path):
    found = judging.read_labels(labels(tmp_path, LABELS)).outcomes
    assert found["ppo"] == {"p1": 1.0, "p2": 1.0, "p3": 0.5, "p4": 0.0}
    assert found["gpt_prompted"] == {"p4": 0.0}
    assert found["gpt"] == {}
    scores = [("a", "sft", 3), ("a", "ppo", 5), ("a", "ppo", 2), ("b", "sft", 1), ("b", "ppo", "1"), ("c", "ppo", 9)]
    rows = [{"prompt": prompt, "model": model, "score": score} for prompt, model, score in scores]
    assert judging.read_labels(labels(tmp_path, rows)).outcomes["ppo"] == {"a": 1.0, "b": 0.5}


def test_ratings_of_single_answers(tmp_path):
    """Two people on p1, one on p2; `likert` is the score where there is none, and what is empty does not count."""
    rows = [
        {"prompt": "p1", "model": "PPO", "likert": 6, "hallucination": "no", "opinion": None},
        {"prompt": "p1", "model": "PPO", "likert": "4", "hallucination": True, "opinion": ""},
        {"prompt": "p2", "model": "PPO", "likert": 2, "hallucination": 0.0, "opinion": 1},
        {"prompt": "p1", "model": "sft", "likert": 3, "hallucination": 1, "opinion": "false"},
        {"prompt": "p2", "model": "sft", "likert": 3, "hallucination": 1, "opinion": "false"},
        {"prompt": "p1", "model": "gpt", "likert": 1, "hallucination": 1, "opinion": "yes"},
    ]
    found = judging.read_labels(labels(tmp_path, rows))
    assert found.outcomes["ppo"] == {"p1": 1.0, "p2": 0.0}
    assert found.pairs["gpt", "ppo"] == {"p1": 0.0}
    measured = ratings.measured(found.rated, 200)
    assert [measured["likert"][name][0] for name in ("ppo", "sft", "gpt")] == [3.5, 3, 1]
    assert measured["metadata"]["hallucination"]["ppo"][0] == 0.25
    assert measured["metadata"]["opinion"]["ppo"][0] == 1
    assert list(measured["metadata"]) == ["hallucination", "opinion"]
    low, high = measured["likert"]["ppo"][1:]
    assert 1 <= low < 3.5 < high <= 7
    names = {name: {"name": title} for name, title in judging.NAMES.items()}
    printed = "\n".join(ratings.section({"models": names} | measured))
    assert "| overall quality, 1 to 7 | 1.00 " in printed
    assert "| makes something up | 1.00 " in printed


def test_labels_compare_all_pairs(tmp_path):
    found = judging.read_labels(labels(tmp_path, LABELS))
    compared = numbers.by_labels(found)
    assert compared("gpt", "ppo").tolist() == [0.0]
    assert compared("ppo", "gpt").tolist() == [1.0]
    assert compared("sft", "ppo").tolist() == [0.0, 0.0, 0.5, 1.0]
    assert compared("gpt", "sft").tolist() == []


def test_several_labels_of_a_prompt_count_as_one(tmp_path):
    """Three people on p1, two of them for PPO, one on p2: the mean is over prompts, (2/3 + 0) / 2."""
    rows = [LABELS[0] | {"winner": winner} for winner in ("a", "b", "a")]
    rows.append({"prompt": "p2", "model_a": "sft", "model_b": "ppo", "winner": "a"})
    found = judging.read_labels(labels(tmp_path, rows)).outcomes["ppo"]
    assert found == {"p1": pytest.approx(2 / 3), "p2": 0.0}


def test_the_difference_of_two_models_takes_all_their_labels(tmp_path):
    rows = [
        {"prompt": f"p{n}", "model_a": name, "model_b": "sft", "winner": winner}
        for n in range(numbers.FEWEST)
        for name, winners in (("gpt_prompted", "ab"), ("gpt", "bb"))
        for winner in winners
    ]
    found = judging.read_labels(labels(tmp_path, rows)).outcomes
    gap = numbers.paired_labels(found, 100)
    assert gap.mean == 0.5
    assert 0 < gap.low < 0.5 < gap.high < 1  # all the same, but only ten
    assert numbers.paired_labels({name: dict(list(found[name].items())[1:]) for name in found}, 100) is None


def test_labels_honour_limit_and_skip_invalid(tmp_path):
    recipe = labels(tmp_path, [LABELS[0], LABELS[0] | {"winner": "c"}, *LABELS[1:]])
    source = recipe.eval.labels.model_copy(update={"limit": 2, "skip_invalid": True})
    found = judging.read_labels(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"labels": source})}))
    assert found.outcomes["ppo"] == {"p1": 1.0, "p2": 1.0}
    assert found.invalid == 1


def test_labels_of_the_best_of_n(tmp_path):
    """An earlier run's samples hold them; they count where the recipe has that baseline."""
    recipe = labels(tmp_path, [LABELS[0], LABELS[0] | {"model_a": "best_of_n"}])
    asked = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"best_of_n": 8})})
    assert judging.read_labels(asked).outcomes["best_of_n"] == {"p1": 1.0}
    with pytest.raises(UserError, match="there is no model 'best_of_n'"):
        judging.read_labels(recipe)


def test_labels_of_prompts_that_are_not_evaluated(tmp_path):
    recipe = labels(tmp_path, LABELS)
    some = judging.read_labels(recipe, ["P1 ", "p4", "p9"])
    assert some.outcomes["ppo"] == {"p1": 1.0, "p4": 0.0}
    assert (some.prompts(), some.other_prompts, some.evaluated) == (2, 2, True)
    none = judging.read_labels(recipe, ["p9"])
    assert (none.prompts(), none.other_prompts, none.evaluated) == (4, 0, False)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (LABELS[0] | {"winner": "c"}, "there is no model 'c'; the models are gpt, gpt_prompted, sft, ppo, ppo_ptx"),
        (LABELS[0] | {"winner": "gpt"}, "the winner 'gpt' is neither of ppo and sft"),
        (LABELS[0] | {"model_a": "PPO2"}, "there is no model 'PPO2'"),
        ({"prompt": "p", "model": "sft", "score": "good"}, "score is 'good', but must be a number"),
        ({"prompt": "p", "model": "sft", "likert": 8}, "likert is 8, but must be a number from 1 to 7"),
        (
            {"prompt": "p", "model": "sft", "score": 8, "sexual": "a bit"},
            "sexual is 'a bit', but must be 1 or 0, yes or no, true or false",
        ),
        ({"prompt": "p", "model": "sft"}, "there is no 'score'"),
    ],
)
def test_wrong_labels(tmp_path, row, problem):
    with pytest.raises(UserError, match=r"labels\.jsonl line 2") as caught:
        judging.read_labels(labels(tmp_path, [LABELS[0], row]))
    assert problem in str(caught.value)


def test_labels_that_compare_nothing_with_sft(tmp_path):
    with pytest.raises(UserError, match=r"no label in .* compares a model with SFT on the same prompt"):
        judging.read_labels(labels(tmp_path, LABELS[-1:]))


def test_an_evaluation_by_labels(world_run, tmp_path):
    recipe, inputs, folder, *_ = world_run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    path = labels(tmp_path, LABELS).eval.labels.path
    settings = recipe.eval.model_copy(update={"judge": "labels", "labels": Source(path=path)})
    stage.run("eval", recipe.model_copy(update={"eval": settings}), inputs, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["models"]["ppo"]["win_rate"][0] == pytest.approx(0.625)
    assert metrics["models"]["gpt"]["win_rate"] is None
    report = (tmp_path / "report.md").read_text()
    assert path.replace("_", "\\_") in report
    assert "of an earlier run's samples" in report
    note = "prompts labelled against SFT: 4 (GPT (prompted) 1, PPO 4), none of them among the held-out prompts"
    assert note in report
    assert any(note in line for line in metrics["table"]["notes"])
    assert not any("SFT <" in claim["claim"] for claim in metrics["claims"])  # four prompts decide nothing
