"""The K-wise reward trainer against brute force over pairs, TRL's own trainer, and itself in micro-batches."""

import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from instructrl.stages.pretrain import make_tokenizer
from instructrl.trainers.losses import kwise_loss
from instructrl.trainers.ranking import KWiseRewardTrainer, RankingCollator, score, untied_pairs

TOKENIZER = make_tokenizer(["a b c d e f g h"], 300)
PAD = TOKENIZER.pad_token_id


def reward_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=PAD,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config)


def rankings(sizes, seed=0, ties=True):
    rng = random.Random(seed)
    rows = []
    for k in sizes:
        completions = [[0, *(rng.randrange(2, 300) for _ in range(rng.randrange(2, 9)))] for _ in range(k)]
        ranks = [1, 2, *(rng.randrange(1, k + 1) for _ in range(k - 2))] if ties else rng.sample(range(1, k + 1), k)
        rng.shuffle(ranks)
        rows.append({"completion_ids": completions, "ranks": ranks})
    return rows


def trainer(folder, rows, model=None, **options):
    args = {
        "output_dir": str(folder),
        "report_to": [],
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "max_steps": 1,
        "logging_steps": 1,
    } | options
    return KWiseRewardTrainer(
        model=model or reward_model(),
        args=RewardConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def brute_force(model, rows):
    """The paper's equation 1, pair by pair, each completion alone: a tie adds no pair."""
    losses = []
    for row in rows:
        scores = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in row["completion_ids"]]
        terms = [
            -torch.log(1 / (1 + torch.exp(scores[j] - scores[i])))
            for i in range(len(scores))
            for j in range(len(scores))
            if row["ranks"][i] < row["ranks"][j]
        ]
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("sizes", [(2,), (3, 3), (4, 9), (5, 6, 7, 8), (9, 9)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 20, 1024])  # each sequence alone, a few together, all
def test_loss_and_gradient_equal_the_sum_over_pairs(tmp_path, sizes, ties, max_tokens):
    model, twin = reward_model().double(), reward_model().double()
    rows = rankings(sizes, seed=len(sizes), ties=ties)
    kwise = trainer(tmp_path, rows, model)
    kwise.max_tokens = max_tokens
    loss = kwise.compute_loss(model, RankingCollator(PAD)(rows))
    expected = brute_force(twin, rows)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient(model) - gradient(twin)).abs().max() < 1e-6
    assert gradient(twin).abs().max() > 1e-3


@pytest.mark.parametrize("center", [None, 0.3])
def test_two_completions_are_trls_pair_loss(tmp_path, center):
    rows = rankings([2] * 5, ties=False)
    pairs = [
        {
            "chosen_ids": row["completion_ids"][row["ranks"].index(1)],
            "rejected_ids": row["completion_ids"][row["ranks"].index(2)],
        }
        for row in rows
    ]
    kwise = trainer(tmp_path, rows, center_rewards_coefficient=center)
    trl = RewardTrainer(
        model=reward_model(), args=kwise.args, train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER
    )
    ours = kwise.compute_loss(kwise.model, kwise.data_collator(rows))
    theirs = trl.compute_loss(trl.model, trl.data_collator(pairs))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert (gradient(kwise.model) - gradient(trl.model)).abs().max() < 1e-6
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert kwise._metrics["train"][name] == pytest.approx(trl._metrics["train"][name], abs=1e-6), name


def test_order_of_completions_does_not_matter():
    torch.manual_seed(3)
    scores, group, rank = torch.randn(9), torch.tensor([0] * 4 + [1] * 5), torch.tensor([1, 2, 2, 4, 3, 1, 5, 5, 2])
    order = torch.randperm(9)
    loss = kwise_loss(scores, group, rank)
    assert kwise_loss(scores[order], group[order], rank[order]).item() == pytest.approx(loss.item(), abs=1e-6)


def test_untied_pairs_by_hand():
    better, worse = untied_pairs(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 1, 2, 1, 1]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (1, 2)]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_do_not_change_the_step(tmp_path, micro):
    """Six prompts of different K and with ties: the step is that of the mean over prompts, however it is cut."""
    rows = rankings([2, 3, 9, 4, 2, 5])
    whole = trainer(tmp_path, rows, optim="sgd", learning_rate=1.0, per_device_train_batch_size=6)
    cut = trainer(
        tmp_path,
        rows,
        optim="sgd",
        learning_rate=1.0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=6 // micro,
    )
    whole.train()
    cut.train()
    start = reward_model()
    moved = max((a - b).abs().max() for a, b in zip(whole.model.parameters(), start.parameters(), strict=True))
    assert moved > 1e-3
    for ours, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    logged = [next(log["loss"] for log in one.state.log_history if "loss" in log) for one in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)


def test_an_incomplete_last_batch_is_a_mean_over_its_own_prompts(tmp_path):
    """Five prompts in batches of 4 = 2 + 2: the second step has one prompt, and its loss is that prompt's."""
    rows = rankings([3] * 5)
    one = trainer(
        tmp_path,
        rows,
        learning_rate=0.0,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    order = list(one._get_train_sampler())
    one.train()
    logged = [log["loss"] for log in one.state.log_history if "loss" in log]
    for step, batch in enumerate((order[:4], order[4:])):
        expected = brute_force(reward_model(), [rows[i] for i in batch]).item()
        assert logged[step] == pytest.approx(expected, abs=1e-4)


def test_overlong_completions_and_rankings_without_a_pair_are_left_out(tmp_path):
    rows = [
        {"completion_ids": [[2, 3], [4] * 9, [5, 6]], "ranks": [1, 2, 3]},
        {"completion_ids": [[2, 3], [4] * 9], "ranks": [1, 2]},
        {"completion_ids": [[2, 3], [4, 5]], "ranks": [1, 1]},
    ]
    kept = trainer(tmp_path, rows, max_length=8).train_dataset
    assert kept["completion_ids"][:] == [[[2, 3], [5, 6]]]
    assert kept["ranks"][:] == [[1, 3]]


def test_text_rows_are_tokenised_with_an_end(tmp_path):
    rows = [{"prompt": "a b", "completions": [" c", " d e"], "ranks": [2, 1]}]
    ids = trainer(tmp_path, rows).train_dataset["completion_ids"][0]
    prompt = TOKENIZER("a b")["input_ids"]
    for text, completion in zip((" c", " d e"), ids, strict=True):
        assert completion == [*prompt, *TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]


@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
def test_scores_do_not_depend_on_their_batch(max_tokens):
    model = reward_model()
    sequences = [ids for row in rankings([4, 5]) for ids in row["completion_ids"]]
    alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    assert score(model, sequences, PAD, max_tokens) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) > 5


def test_a_larger_margin_means_a_smaller_loss():
    group, rank = torch.tensor([0, 0]), torch.tensor([1, 2])
    for gap in (-1.0, 0.0, 2.0):
        loss = kwise_loss(torch.tensor([gap, 0.0]), group, rank).item()
        assert loss == pytest.approx(math.log(1 + math.exp(-gap)), abs=1e-6)
