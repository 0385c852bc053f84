"""The reward-model stage: what it measures by hand, the bias, what is left out, and that it learns."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from instructrl.config import Pretrain, Recipe
from instructrl.errors import UserError
from instructrl.stages import models, preferences, reward_model
from instructrl.stages.checkpoints import LOG
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.pretrain import make_model, make_tokenizer
from instructrl.stages.tables import DEMONSTRATIONS, RANKINGS, write_table
from instructrl.trainers.losses import kwise_loss
from instructrl.trainers.ranking import score

GOOD, BAD, POOR = "yes gladly", "no never", "perhaps"
DEMONSTRATIONS_ = [{"prompt": f"ask {n}", "response": GOOD} for n in range(30)]


def recipe(**sections):
    base = {
        "model": {"path": None},
        "data": {"world": {}},
        "eval": {"judge": "gold"},
        "reward_model": {"learning_rate": 1e-2, "batch_size": 4, "epochs": 4},
        "runtime": {"device": "cpu", "logging_steps": 1, "micro_batch_size": 4},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return Recipe(**base)


def ranking(n, source="a", **columns):
    """Good before bad, poor between them or tied with the bad; in random order."""
    rng = random.Random(n)
    ranked = [(GOOD, 1), (POOR, 2 + n % 2), (BAD, 3)][: 2 + (n % 3 > 0)]
    rng.shuffle(ranked)
    texts, ranks = zip(*ranked, strict=True)
    return {"prompt": f"ask {n}", "responses": texts, "ranks": ranks, "source": source} | columns


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = make_tokenizer(["ask yes gladly no never perhaps 0123456789"] * 3, 300)
    torch.manual_seed(0)
    settings = Pretrain(vocab_size=300, hidden_size=16, layers=1, heads=2, context_length=64)
    models.save(make_model(settings, tokenizer), Contract(tokenizer, "{prompt}\n"), folder / "model")
    return folder


def write(folder, train, valid, table="train"):
    folder.mkdir(exist_ok=True)
    write_table(folder / "demonstrations.train.parquet", DEMONSTRATIONS_, DEMONSTRATIONS)
    write_table(folder / f"rankings.{table}.parquet", train, RANKINGS)
    write_table(folder / "rankings.valid.parquet", valid, RANKINGS)
    return folder


@pytest.mark.parametrize("name", ["reward_model", "judge"])
def test_it_learns_is_shifted_and_loads(sft, tmp_path, name):
    table = "judge" if name == "judge" else "train"
    train, valid = [ranking(n) for n in range(40)], [ranking(n, "ab"[n % 2]) for n in range(40, 60)]
    data = write(tmp_path / "data", train, valid, table)
    folder = tmp_path / name
    folder.mkdir()
    metrics = reward_model.run(name, recipe(), {"data": data, "sft": sft}, folder)
    json.dumps(metrics)
    assert metrics["rankings"] == 40
    assert metrics["steps"] == 40
    assert metrics["accuracy"] > 0.9
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["prompts"] == 20
    assert metrics["pairs"] == sum(len(preferences.pairs(row["ranks"])) for row in valid)
    assert set(metrics["by_source"]) == {"a", "b"}
    assert sum(part["pairs"] for part in metrics["by_source"].values()) == metrics["pairs"]
    assert metrics["agreement"] is metrics["held_out_accuracy"] is metrics["gold_accuracy"] is None
    assert metrics["bag_of_words"] > 0.9
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert {"accuracy", "margin", "loss"} <= lines[0].keys()

    model, bias = models.load_reward_model(folder / "model", recipe())
    contract = Contract.load(folder / "model")
    demonstrations = [contract.prompt(row["prompt"]) + contract.response(GOOD) for row in DEMONSTRATIONS_]
    raw = score(model, demonstrations, contract.tokenizer.pad_token_id)
    shifted = [one - bias for one in raw]
    assert sum(shifted) / len(shifted) == pytest.approx(0, abs=1e-5)
    assert abs(bias) > 0.1
    assert metrics["reward_bias"] == pytest.approx(bias)
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert stock.config.num_labels == 1
    ids = torch.tensor([demonstrations[0]])
    assert stock(ids).logits.item() == pytest.approx(raw[0], abs=1e-5)


def test_shuffled_pairs_are_rankings_of_two_in_as_many_steps(sft, tmp_path):
    data = write(tmp_path / "data", [ranking(n) for n in range(40)], [ranking(n) for n in range(40, 60)])
    (tmp_path / "made").mkdir()
    asked = recipe(reward_model={"shuffle_pairs": True, "epochs": 1})
    metrics = reward_model.run("reward_model", asked, {"data": data, "sft": sft}, tmp_path / "made")
    pairs = sum(len(preferences.pairs(ranking(n)["ranks"])) for n in range(40))
    assert metrics["rankings"] == 40
    assert round(pairs / 40) == 2
    assert metrics["steps"] == math.ceil(pairs / (4 * 2))  # 4 rankings a step
    assert metrics["accuracy"] > 0.9


def test_single_pairs_by_hand():
    row = {"number": 7, "completion_ids": [[1], [2], [3]], "ranks": [2, 1, 2]}
    assert reward_model.singles([row]) == [
        {"number": 7, "completion_ids": [[2], [1]], "ranks": [1, 2]},
        {"number": 7, "completion_ids": [[2], [3]], "ranks": [1, 2]},
    ]


def test_the_loss_on_held_out_rankings_is_the_trainers():
    rows = [{"scores": [0.5, -1.0, 2.0], "ranks": [1, 2, 2]}, {"scores": [90.0, -90.0], "ranks": [2, 1]}]
    scores = torch.tensor([score for row in rows for score in row["scores"]])
    ranks = torch.tensor([rank for row in rows for rank in row["ranks"]])
    expected = kwise_loss(scores, torch.tensor([0, 0, 0, 1, 1]), ranks).item()
    assert reward_model.held_out_loss(rows) == pytest.approx(expected, rel=1e-6)


def test_the_shift_changes_no_order():
    row = {"ranks": [1, 2, 3], "scores": [0.2, 0.9, 0.1]}
    shifted = {"ranks": [1, 2, 3], "scores": [one - 7.5 for one in row["scores"]]}
    assert preferences.tally(row["scores"], row["ranks"]) == preferences.tally(shifted["scores"], row["ranks"])


def test_trunk_is_the_sft_models_and_the_head_is_new(sft):
    model = models.init_reward_model(sft / "model", recipe())
    policy = models.load_policy(sft / "model", recipe())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, model.model.get_parameter(name)), name
    assert 0 < model.score.weight.std() < 1


def test_what_is_left_out_is_counted(sft):
    model = models.load_policy(sft / "model", recipe())
    contract = Contract.load(sft / "model")
    limits = Limits.of(recipe(data={"world": {}, "max_response_tokens": 20}), model)
    dropped = reward_model.Counter()
    rows = reward_model.encode(
        [
            {"prompt": "a", "responses": ["x", "y " * 30, "z"], "ranks": [1, 2, 3], "source": "s"}
            | {"annotators": [[1, 2, 3]], "held_out": [[3, 2, 1]], "gold": [1, 1, 2]},
            {"prompt": "b", "responses": ["x", "y " * 30], "ranks": [1, 2]} | EXTRA,
            {"prompt": "c", "responses": ["x", "y"], "ranks": [1, 1]} | EXTRA,
        ],
        contract,
        limits,
        dropped,
    )
    assert [row["responses"] for row in rows] == [["x", "z"]]
    assert (rows[0]["ranks"], rows[0]["annotators"], rows[0]["held_out"]) == ([1, 3], [[1, 3]], [[3, 1]])
    assert rows[0]["gold"] == [1, 2]
    assert rows[0]["completion_ids"][1] == contract.prompt("a") + contract.response("z")
    assert dropped == {
        "responses with a response above data.max_response_tokens=20": 2,
        "rankings without an untied pair": 2,
    }


EXTRA = {"annotators": [], "held_out": [], "gold": []}


def test_nothing_left_is_one_sentence_with_counts(sft, tmp_path):
    tied = [{"prompt": f"p{n}", "responses": ["x", "y"], "ranks": [1, 1]} for n in range(3)]
    data = write(tmp_path / "data", tied, [ranking(1)])
    with pytest.raises(UserError, match=r"no ranking .* left to train on; dropped: 3 rankings without an untied pair"):
        reward_model.run("reward_model", recipe(), {"data": data, "sft": sft}, tmp_path)
    data = write(tmp_path / "data", [ranking(1)], tied)
    with pytest.raises(UserError, match="left to measure it with; dropped: 3 rankings without an untied pair"):
        reward_model.run("reward_model", recipe(), {"data": data, "sft": sft}, tmp_path)


def test_wrong_trainer_fields_are_one_sentence():
    with pytest.raises(UserError, match=r"reward_model\.trainer\.center_rewards_coef.* Did you mean"):
        reward_model.check(recipe(reward_model={"trainer": {"center_rewards_coef": 0.1}}))
    reward_model.check(recipe(reward_model={"trainer": {"center_rewards_coefficient": 0.1}}))


# ---- preferences ---------------------------------------------------------------------------------------------------


def test_pairs_and_tallies_by_hand():
    assert preferences.pairs([2, 1, 2]) == [(1, 0), (1, 2)]
    assert preferences.tally([0.0, 1.0, 2.0], [2, 1, 2]) == (1.0, 2)
    assert preferences.tally([1.0, 1.0, 0.0], [2, 1, 2]) == (1.5, 2)


def test_agreement_by_hand():
    """Of a, b > c against b > a, c > ... the pairs that neither ties: {a-c agree, b-c agree, a-b differ}."""
    rows = [{"annotators": [[1, 2, 3], [2, 1, 3]], "held_out": [[1, 1, 2]], "gold": [3, 2, 1]}]
    assert preferences.agreement(rows).mean == pytest.approx(2 / 3)
    assert preferences.held_out_agreement(rows).mean == pytest.approx(4.5 / 5)  # the held-out one ties a and b
    assert preferences.gold_agreement(rows).mean == pytest.approx((0 + 1) / 6)
    assert preferences.agreement([{"annotators": []}]) is None


def test_longer_wins_by_hand():
    rows = [
        {"responses": ["long one", "short"], "ranks": [1, 2]},
        {"responses": ["a", "bb"], "ranks": [1, 2]},
        {"responses": ["aa", "bb"], "ranks": [1, 2]},
    ]
    assert preferences.longer_wins(rows).mean == pytest.approx(0.5)


def test_the_interval_resamples_prompts_not_pairs():
    """Ten prompts whose pairs all agree or all disagree: it is as wide as for ten pairs, not for a thousand."""
    few = preferences.share([(float(n % 2), 1) for n in range(10)])
    many = preferences.share([(100.0 * (n % 2), 100) for n in range(10)])
    assert (many.low, many.high) == (few.low, few.high)
    assert many.high - many.low > 0.5


def test_bag_of_words_finds_the_word_that_wins_and_nothing_where_there_is_nothing():
    rng = random.Random(0)

    def row(signal):
        texts = [" ".join(rng.choice(["tree", "house", "river"]) for _ in range(5)) for _ in range(3)]
        ranks = [1, 2, 3]
        return {
            "responses": [text + " please" * (signal and rank == 1) for text, rank in zip(texts, ranks, strict=True)],
            "ranks": ranks,
        }

    for signal, low, high in ((True, 0.8, 1.0), (False, 0.35, 0.65)):
        train, valid = [row(signal) for _ in range(150)], [row(signal) for _ in range(80)]
        assert low <= preferences.bag_of_words(train, valid).mean <= high
    assert preferences.bag_of_words([], []) is None
