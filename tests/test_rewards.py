"""Scores by reward models, with and without a vocabulary of their own, and by functions; and what goes wrong."""

import json

import pytest
import tiny_models as tiny
import torch
from test_ppo import PROMPTS, trained, trainer
from test_prompts import TEMPLATE, chat_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from instructrl.trainers.rewards import Rewards


def foreign_tokenizer():
    """The same words under other numbers, and more of them."""
    names = ["<none>", "<stop>", "<fill>", *(f"w{i}" for i in reversed(range(60)))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<none>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<stop>", pad_token="<fill>", unk_token="<none>")


def scores_alone(model, sequences):
    """One sequence at a time, by the model's own pooling."""
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, 0].item() for ids in sequences]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_reward_model_with_its_own_vocabulary_reads_its_own_ids(tmp_path, architecture):
    other = foreign_tokenizer()
    model = tiny.reward_model(architecture, vocab_size=len(other), pad_token_id=2, eos_token_id=1)
    models = {"reward_model": model, "reward_processing_class": other}
    made = trainer(tmp_path, architecture, models=models, response_length=20, missing_eos_penalty=0.0)
    episodes = made.experience(0)
    assert episodes.ended.any()
    assert not episodes.ended.all()
    expected = []
    for ids, ended in zip(episodes.sequences, episodes.ended.tolist(), strict=True):
        theirs = [other.convert_tokens_to_ids(f"w{token}") for token in ids if token > 2]
        expected.append(theirs + ([1] if ended else []))
    assert episodes.scores.tolist() == pytest.approx(scores_alone(model, expected), abs=1e-5)


def test_a_sequence_too_long_for_the_reward_model_loses_its_beginning():
    other = foreign_tokenizer()
    model = tiny.reward_model("gpt2", vocab_size=len(other), pad_token_id=2, eos_token_id=1, n_positions=6)
    rewards = Rewards(tiny.tokenizer(), model, other)
    prompt, response = [3, 4, 5, 6, 7, 8], [9, 10, tiny.EOS]
    ids = [other.convert_tokens_to_ids(f"w{token}") for token in (6, 7, 8, 9, 10)]
    assert rewards([{}], [prompt], [response], [True]) == pytest.approx(scores_alone(model, [[*ids, 1]]), abs=1e-5)


def test_another_vocabulary_without_its_tokenizer_is_refused(tmp_path):
    models = {"reward_model": tiny.reward_model("llama", vocab_size=20)}
    with pytest.raises(ValueError, match=r"reward_model's vocabulary \(20\).*needs reward_processing_class"):
        trainer(tmp_path, models=models)


def test_conversations_reach_functions_as_messages(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, **_):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": f"w{5 + i}"}]} for i in range(8)]
    models = {"train_dataset": rows, "processing_class": chat_tokenizer(), "reward_funcs": [reward]}
    made = trainer(tmp_path, models=models)
    episodes = made.experience(0)
    assert sorted(p[0]["content"] for p in seen["prompts"]) == sorted(f"w{5 + i}" for i in range(8))
    for prompt, completion, ids in zip(seen["prompts"], seen["completions"], episodes.responses, strict=True):
        assert prompt[0]["role"] == "user"
        text = " ".join(f"w{i}" for i in ids if i > 2)
        assert completion == [{"role": "assistant", "content": text}]


def test_none_says_nothing(tmp_path):
    def some(completion_ids, **_):
        return [None if number % 2 else 3.0 for number in range(len(completion_ids))]

    made = trainer(tmp_path, models={"reward_model": None, "reward_funcs": [some, some]})
    assert made.experience(0).scores.tolist() == [6.0, 0.0] * 4


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_function_that_raises_is_named(tmp_path):
    def broken(**_):
        raise KeyError("answer")

    made = trainer(tmp_path, models={"reward_funcs": [broken]})
    with pytest.raises(ValueError, match="reward function broken failed: KeyError: 'answer'"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_answers_that_all_reach_the_limit_are_learnt_from(tmp_path, architecture):
    made = trained(tmp_path, architecture, response_length=1, total_episodes=16)
    line = made.state.log_history[0]
    assert line["completions/mean_length"] == 1
    made = trainer(tmp_path, architecture, stop_token_id=tiny.PAD)  # a token that is never sampled
    episodes = made.experience(0)
    assert not episodes.ended.any()
    assert episodes.mask.all()
    assert torch.allclose(episodes.final_scores, episodes.scores - 1)


def test_an_answer_without_words_is_an_answer(tmp_path):
    """EOS at once: one token, empty text."""
    policy = tiny.policy("llama")
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    texts = []

    def reward(completions, **_):
        texts.extend(completions)
        return [1.0] * len(completions)

    policy.lm_head.weight.data.zero_()  # every token alike
    uniforms = torch.zeros(8, 8)  # the first token of the vocabulary: EOS
    models = {"model": policy, "reward_model": None, "reward_funcs": [reward]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **_: uniforms[: size[0], : size[1]])
        made = trained(tmp_path, models=models, total_episodes=8)
    assert texts == [""] * 8
    assert made.last_episodes.responses == [[tiny.EOS]] * 8
    assert made.last_episodes.ended.all()
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_prompts_that_are_all_the_same_are_learnt_from(tmp_path):
    made = trained(tmp_path, models={"train_dataset": PROMPTS[:1]})
    assert all(torch.isfinite(p).all() for p in made.model.parameters())

    def same(completion_ids, **_):
        return [1.0] * len(completion_ids)

    models = {"train_dataset": PROMPTS[:1], "reward_model": None, "reward_funcs": [same]}
    made = trained(tmp_path, models=models, response_length=1, missing_eos_penalty=0.0, lam=1.0)
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_an_unended_answer_may_have_a_fixed_score(tmp_path):
    options = {"kl_coef": 0.0, "lam": 1.0, "whiten_advantages": False}
    episodes = trainer(tmp_path, missing_eos_score=-7.0, **options).experience(0)
    assert (~episodes.ended).any()
    assert torch.allclose(episodes.returns[:, 0], torch.where(episodes.ended, episodes.scores, -7.0), atol=1e-5)


def test_a_foreign_reward_model_tells_an_answer_that_ended_from_one_that_was_cut():
    other = foreign_tokenizer()
    other.chat_template = TEMPLATE.replace(
        "{{ m.content }} ", "{{ m.content }} {{ m.role[0] == 'a' and '<stop>' or '' }} "
    )
    model = tiny.reward_model("llama", vocab_size=len(other), pad_token_id=2, eos_token_id=1)
    rewards, rows = Rewards(tiny.tokenizer(), model, other), [{"prompt": [{"role": "user", "content": "w9"}]}] * 2
    scores = rewards(rows, [[9], [9]], [[5, tiny.EOS], [5]], [True, False])
    words = [other.convert_tokens_to_ids(f"w{i}") for i in (3, 9, 4, 5)]
    assert scores == pytest.approx(scores_alone(model, [[*words, 1], words]), abs=1e-5)


def test_columns_may_have_any_name_and_functions_return_any_numbers(tmp_path):
    def reward(completion_ids, function, **_):
        return torch.tensor([float(number) for number in function])

    rows = [row | {"function": index, "completion_ids": "mine"} for index, row in enumerate(PROMPTS)]
    made = trainer(tmp_path, models={"train_dataset": rows, "reward_model": None, "reward_funcs": [reward]})
    assert made.experience(0).scores.tolist() == [float(row) for row in made.prompt_order.rows(0, 8)]


def test_tables_of_completions_are_written(tmp_path):
    made = trained(tmp_path, total_episodes=40, completions_every=3, num_completions=5)
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == ["000000.jsonl", "000003.jsonl", "000004.jsonl"]
    lines, episodes = [json.loads(line) for line in files[-1].read_text().splitlines()], made.last_episodes
    assert len(lines) == 5
    for row, line in enumerate(lines):
        ids = episodes.responses[row]
        assert line["length"] == len(ids)
        assert line["ended"] == (ids[-1] == tiny.EOS)
        assert line["completion"].split() == [f"w{i}" for i in ids if i > 2]
        assert line["score"] == pytest.approx(episodes.scores[row].item())
        assert line["reward"] == pytest.approx(line["score"] - (not line["ended"]) - 0.02 * line["kl"], abs=1e-5)
