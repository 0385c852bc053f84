"""Best-of-n: against one sequence at a time, and against what extreme-value statistics say."""

import math

import pytest
import tiny_models as tiny
import torch

from instructrl.trainers import best_of_n, generate, kl_bound

PROMPTS = tiny.sequences(5, 2, 7)
SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rounds(policy, n):
    """n responses to each prompt, one `generate` after the other."""
    generator = seeded()
    return [generate(policy, PROMPTS, generator=generator, **SAMPLING) for _ in range(n)]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_best_is_that_of_brute_force(architecture):
    """Against a reward model that reads one sequence at a time."""
    policy, judge = tiny.policy(architecture), tiny.reward_model(architecture)
    found = best_of_n(policy, PROMPTS, 7, judge, generator=seeded(), **SAMPLING)
    for row, prompt in enumerate(PROMPTS):
        candidates = [made[row].ids for made in rounds(policy, 7)]
        with torch.no_grad():
            trunks = [judge.base_model(torch.tensor([prompt + ids])).last_hidden_state[0, -1] for ids in candidates]
            scores = [float(judge.score(trunk)) for trunk in trunks]
        assert found.completions[row].ids == candidates[scores.index(max(scores))]
        assert found.scores[row].item() == pytest.approx(max(scores), abs=1e-5)
    assert len({tuple(made[0].ids) for made in rounds(policy, 7)}) > 1


def test_the_first_of_the_n_is_what_generate_returns():
    policy = tiny.policy("llama")
    found = best_of_n(policy, PROMPTS, 1, lambda prompts, rows: [0.0] * len(rows), generator=seeded(), **SAMPLING)
    alone = generate(policy, PROMPTS, generator=seeded(), **SAMPLING)
    assert [one.ids for one in found.completions] == [one.ids for one in alone]
    for one, other in zip(found.completions, alone, strict=True):
        assert torch.equal(one.logprobs, other.logprobs)


def test_results_do_not_depend_on_how_many_are_decoded_together():
    policy, judge = tiny.policy("gpt2"), tiny.reward_model("gpt2")
    made = [
        best_of_n(policy, PROMPTS, 7, judge, generator=seeded(), batch_size=size, **SAMPLING) for size in (1, 11, 99)
    ]
    for other in made[1:]:
        assert [one.ids for one in other.completions] == [one.ids for one in made[0].completions]
        torch.testing.assert_close(other.scores, made[0].scores, atol=1e-5, rtol=0)


def test_no_more_than_a_batch_is_kept():
    """The scoring function never sees more than max(prompts, batch_size) responses, and sees n of each prompt."""
    seen = []

    def score(prompts, completions):
        seen.append(len(completions))
        return [0.0] * len(completions)

    policy = tiny.policy("llama")
    best_of_n(policy, PROMPTS, 20, score, generator=seeded(), batch_size=16, **SAMPLING)
    assert seen == [15] * 6 + [10]
    seen.clear()
    best_of_n(policy, PROMPTS, 3, score, generator=seeded(), batch_size=2, **SAMPLING)
    assert seen == [5, 5, 5]


def test_of_equal_scores_the_first_wins():
    policy = tiny.policy("llama")
    for size in (1, 64):
        found = best_of_n(
            policy, PROMPTS, 9, lambda _, rows: [1.0] * len(rows), generator=seeded(), batch_size=size, **SAMPLING
        )
        assert [one.ids for one in found.completions] == [one.ids for one in rounds(policy, 1)[0]]


def uniform_policy():
    """Every token but the padding has the same probability."""
    policy = tiny.policy("llama")
    policy.get_input_embeddings().weight.data.zero_()  # and the head's, which are the same
    return policy


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_expected_maximum_of_known_scores(n):
    """One token of 23, scored by its rank from 0 to 22: E max = sum over k of P(max > k), 1 - ((k + 1) / 23)^n."""
    tokens = tiny.VOCABULARY - 1
    rank = {token: number for number, token in enumerate(t for t in range(tiny.VOCABULARY) if t != tiny.PAD)}
    settings = SAMPLING | {"max_new_tokens": 1}

    def score(prompts, rows):
        return [float(rank[row.ids[0]]) for row in rows]

    found = best_of_n(uniform_policy(), [[5]] * 1500, n, score, generator=seeded(), batch_size=1500, **settings)
    distribution = [((k + 1) / tokens) ** n - (k / tokens) ** n for k in range(tokens)]
    mean = sum(k * p for k, p in enumerate(distribution))
    assert mean == pytest.approx(sum(1 - ((k + 1) / tokens) ** n for k in range(tokens)))
    spread = math.sqrt(sum((k - mean) ** 2 * p for k, p in enumerate(distribution)))
    assert found.scores.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(1500))


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_kl_is_at_most_the_bound(n):
    """Exactly, for m equally likely responses: the bound is the limit of many responses, and holds for few."""

    def kl(m):
        shares = [((k + 1) / m) ** n - (k / m) ** n for k in range(m)]
        return sum(p * math.log(p * m) for p in shares if p)

    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    assert kl(3) <= kl(30) + 1e-12 <= kl_bound(n) + 2e-12
    assert kl(100_000) == pytest.approx(kl_bound(n), abs=1e-3)


@pytest.mark.parametrize(
    ("n", "settings", "score", "message"),
    [
        (0, {}, lambda _, rows: [0.0] * len(rows), "n=0: the best of n needs one response or more"),
        (2, {"temperature": 0.0}, lambda _, rows: [0.0] * len(rows), "temperature=0: all n responses"),
        (2, {}, lambda *_: [0.0], "the scores of 10 responses must be as many numbers"),
        (2, {}, lambda _, rows: [math.nan] * len(rows), "the scores of 10 responses must be as many numbers, not .nan"),
    ],
)
def test_mistakes(n, settings, score, message):
    with pytest.raises(ValueError, match=message):
        best_of_n(tiny.policy("llama"), PROMPTS, n, score, generator=seeded(), **SAMPLING | settings)
