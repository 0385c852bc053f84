"""Labelling: rankings of the policy's own answers, one labeler for training, all of them for held-out prompts."""

import pytest
import torch

from instructrl.config import Pretrain, Recipe
from instructrl.stages import label, models
from instructrl.stages.contract import Contract
from instructrl.stages.pretrain import make_model, make_tokenizer
from instructrl.stages.tables import PROMPTS, read_table, write_table
from instructrl.world import make_world, world_data

RECIPE = Recipe(
    model={"path": None},
    data={
        "world": {
            "documents": 40,
            "valid_documents": 2,
            "demonstrations": 4,
            "ranked_prompts": 24,
            "valid_ranked_prompts": 8,
            "ppo_prompts": 4,
            "eval_prompts": 4,
        }
    },
    eval={"judge": "gold"},
    label={"responses_per_prompt": 4, "response_length": 6, "labelers": 3},
    runtime={"device": "cpu"},
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    world = world_data(RECIPE.data.world, RECIPE.seed)
    data = folder / "data"
    data.mkdir()
    for table in ("rank", "rank_valid"):
        rows = [{"prompt": prompt.text, "spec": prompt.to_json()} for prompt in world.prompts[table]]
        write_table(data / f"prompts.{table}.parquet", rows, PROMPTS)
    tokenizer = make_tokenizer([text for _, text in world.text["train"]], 320)
    torch.manual_seed(0)
    settings = Pretrain(vocab_size=320, hidden_size=16, layers=1, heads=2, context_length=256)
    models.save(make_model(settings, tokenizer), Contract(tokenizer, "{prompt}\n"), folder / "sft" / "model")
    return {"data": data, "sft": folder / "sft"}


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    metrics = label.run("label", RECIPE, inputs, folder)
    return metrics, {split: read_table(folder / f"rankings.{split}.parquet") for split in ("train", "valid")}


def test_every_prompt_is_ranked(made, inputs):
    metrics, tables = made
    for split, name in (("train", "rank"), ("valid", "rank_valid")):
        prompts = [row["prompt"] for row in read_table(inputs["data"] / f"prompts.{name}.parquet")]
        assert [row["prompt"] for row in tables[split]] == prompts
        assert metrics["rankings" if split == "train" else "valid_rankings"] == len(prompts)
    for row in tables["train"] + tables["valid"]:
        assert 1 <= len(row["responses"]) <= 4
        assert len(set(row["responses"])) == len(row["responses"])
        assert len(row["ranks"]) == len(row["gold"]) == len(row["responses"])
        assert min(row["ranks"]) == 1


def test_all_rank_held_out_prompts_and_one_each_training_prompt(made):
    _, tables = made
    for row in tables["train"]:
        assert row["annotators"] == row["held_out"] == []
    for row in tables["valid"]:
        assert len(row["annotators"]) == len(row["held_out"]) == 3
        assert row["ranks"] == row["annotators"][int(row["labeler"].split()[1]) - 1]
    assert {row["labeler"] for row in tables["train"]} == {"labeler 1", "labeler 2", "labeler 3"}


def test_metrics_are_shares(made):
    metrics, tables = made
    for name in ("agreement", "held_out_agreement", "gold_agreement"):
        assert 0 <= metrics[name] <= 1
    assert metrics["responses_per_prompt"] == sum(len(row["responses"]) for row in tables["train"]) / 24


def test_the_same_seed_gives_the_same_rankings(made, inputs, tmp_path):
    label.run("label", RECIPE, inputs, tmp_path)
    assert read_table(tmp_path / "rankings.train.parquet") == made[1]["train"]


def test_without_noise_and_tastes_all_agree_with_the_gold_preference(inputs):
    settings = RECIPE.label.model_copy(update={"agreement_noise": 1e-12, "taste_spread": 0.0, "tie_threshold": 0.0})
    panel = label.Panel(RECIPE.model_copy(update={"label": settings}))
    world = make_world(RECIPE.data.world, RECIPE.seed)
    for prompt in read_table(inputs["data"] / "prompts.rank_valid.parquet"):
        answers = [("I do not know.", True), ("You fool.", True), ("", False), ("The The The", False)]
        row = panel.rank(world, prompt, answers, by_all=True)
        assert row["responses"] == [text for text, _ in answers]
        for ranks in (*row["annotators"], *row["held_out"]):
            for i, j in label.preferences.pairs(row["gold"]):
                assert ranks[i] < ranks[j]


def test_held_out_labelers_are_others():
    panel = label.Panel(RECIPE)
    assert len(panel.labelers) == len(panel.held_out) == 3
    assert not set(panel.labelers) & set(panel.held_out)
