"""The tiny world's text, prompts, splits and tasks."""

import random
import subprocess
import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from instructrl import config
from instructrl.world import Prompt, World, make_world, world_data
from instructrl.world.answers import answer
from instructrl.world.checks import split
from instructrl.world.documents import MIX
from instructrl.world.lexicon import CATEGORIES, RUDE
from instructrl.world.prompts import USE_CASES

SMALL = config.World(
    documents=400,
    valid_documents=60,
    demonstrations=300,
    ranked_prompts=200,
    valid_ranked_prompts=60,
    ppo_prompts=300,
    eval_prompts=150,
)
PRINT_DIGEST = """
import hashlib, random, sys
from instructrl import config
from instructrl.world import labelers, world_data, make_world
sizes = config.World(documents=80, valid_documents=20, demonstrations=40, ranked_prompts=30, eval_prompts=30)
world, data = make_world(sizes, 5), world_data(sizes, 5)
judged = [world.judge(*pair) for pair in data.demonstrations["train"]]
ranks = labelers(2, 1, 0.3)[0].rank(judged, random.Random(0), 0.5)
print(hashlib.sha256(repr((data, judged, ranks, world.prompted_templates(random.Random(0), 3))).encode()).hexdigest())
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def data():
    return world_data(SMALL, 3)


def share_is(count: int, of: int, expected: float) -> bool:
    """Within four standard errors."""
    return abs(count / of - expected) <= 4 * sqrt(expected * (1 - expected) / of)


def test_same_bytes_in_every_process():
    root = Path(__file__).parents[1]
    digests = {
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(digests) == 1


def test_the_global_random_generator_plays_no_part(world):
    random.seed(1)
    before = random.getstate()
    first = world_data(SMALL, 3)
    assert random.getstate() == before
    random.seed(2)
    assert world_data(SMALL, 3) == first


def test_seeds_make_different_worlds():
    assert World(0).lexicon.facts != World(1).lexicon.facts
    assert World(0).documents(3, random.Random(0)) != World(1).documents(3, random.Random(0))


@pytest.mark.parametrize(("people", "strangers"), [(2, 1), (60, 40)])
def test_worlds_of_other_sizes(people, strangers):
    sizes = SMALL.model_copy(update={"people": people, "strangers": strangers})
    small_or_large = world_data(sizes, 0)
    assert len(small_or_large.prompts["eval"]) == SMALL.eval_prompts
    lexicon = make_world(sizes, 0).lexicon
    assert (len(lexicon.people), len(lexicon.strangers)) == (people, strangers)


@pytest.mark.parametrize("seed", range(20))
def test_names_are_distinct_and_are_no_other_words(seed):
    lexicon = World(seed, people=60, strangers=40).lexicon
    invented = [name.lower() for name in lexicon.everyone + lexicon.towns] + list(lexicon.dictionary.values())
    assert len(set(invented)) == len(invented)
    words = {word for words in CATEGORIES.values() for word in words} | RUDE
    assert words.isdisjoint(invented)
    assert set(lexicon.facts) == {(person, name) for person in lexicon.people for name in lexicon.values}


def test_documents_come_in_their_mix(world):
    kinds = Counter(kind for kind, _ in world.documents(6000, random.Random(1)))
    total = sum(MIX.values())
    assert set(kinds) == set(MIX)
    assert all(share_is(kinds[kind], 6000, share / total) for kind, share in MIX.items())


def test_documents_state_only_facts(world):
    lexicon = world.lexicon
    for kind, text in world.documents(3000, random.Random(2)):
        words = split(text)
        if kind == "sums":
            numbers = [int(word) for word in words if word.isdecimal()]
            assert all(a + b == c for a, b, c in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        if kind == "facts":
            for sentence in text.split(". "):
                said = set(split(sentence))
                (person,) = said & set(lexicon.people)
                assert any(lexicon.facts[person, name] in said for name in lexicon.values)
        if kind == "dictionary":
            assert all(lexicon.dictionary[line.split(" : ")[0]] == line.split(" : ")[1] for line in text.split("\n"))


def test_prompts_come_in_their_mix(world):
    prompts = world.prompts(6000, random.Random(1))
    use_cases = Counter(prompt.use_case for prompt in prompts)
    assert all(share_is(use_cases[name], 6000, share) for name, share in USE_CASES.items())
    kinds = Counter(prompt.kind for prompt in prompts)
    with_shots = sum(USE_CASES[name] for name in ("open_qa", "sums", "classification", "extraction", "brainstorming"))
    assert share_is(kinds["user"], 6000, 0.2)
    assert share_is(kinds["few_shot"], 6000, 0.15 * with_shots)
    assert share_is(sum(prompt.constraint is not None for prompt in prompts), 6000, 0.6)
    unanswerable = Counter(prompt.use_case for prompt in prompts if prompt.unanswerable)
    assert set(unanswerable) == {"open_qa", "closed_qa"}
    assert share_is(unanswerable["open_qa"], use_cases["open_qa"], 0.2)
    assert share_is(unanswerable["closed_qa"], use_cases["closed_qa"], 0.3)


def test_a_part_keeps_the_mix(world):
    prompts = world.prompts(3000, random.Random(1), of="eval", unique=True)
    use_cases = Counter(prompt.use_case for prompt in prompts)
    assert all(share_is(use_cases[name], 3000, share) for name, share in USE_CASES.items())
    assert share_is(sum(prompt.constraint is not None for prompt in prompts), 3000, 0.6)
    assert {world.part(prompt) for prompt in prompts} == {"eval"}


def test_unique_prompts_repeat_less(world):
    def texts(unique: bool) -> int:
        return len({prompt.text for prompt in world.prompts(800, random.Random(1), of="eval", unique=unique)})

    assert texts(unique=True) > texts(unique=False) + 50


def test_prompt_text_of_each_kind():
    fields: dict[str, Any] = {
        "use_case": "sums",
        "body": "Add 1 and 2.",
        "about": {"first": 1, "second": 2, "value": "3"},
    }
    assert Prompt(kind="plain", **fields).text == "Add 1 and 2."
    assert Prompt(kind="plain", constraint=("end", "bye"), **fields).text == "Add 1 and 2. End with the word bye."
    assert Prompt(kind="plain", constraint=("start", "Yes"), **fields).text == "Add 1 and 2. Start with the word Yes."
    assert Prompt(kind="plain", constraint=("polite", ""), **fields).text == "Add 1 and 2. Be polite."
    assert Prompt(kind="user", constraint=("one_word", ""), opening="I need help.", **fields).text == (
        "I need help. Add 1 and 2. Use one word."
    )
    shots = (("Add 0 and 1.", "0 plus 1 is 1."), ("Add 2 and 2.", "2 plus 2 is 4."))
    few_shot = Prompt(kind="few_shot", shots=shots, **fields)
    assert few_shot.text == "Add 0 and 1.\n0 plus 1 is 1.\nAdd 2 and 2.\n2 plus 2 is 4.\nAdd 1 and 2."


def test_prompts_survive_json(world):
    prompts = world.prompts(500, random.Random(4))
    assert {prompt.kind for prompt in prompts} == {"plain", "few_shot", "user"}
    copies = [Prompt.from_json(prompt.to_json()) for prompt in prompts]
    assert copies == prompts
    assert [copy.text for copy in copies] == [prompt.text for prompt in prompts]


def test_sizes(data):
    assert {name: len(rows) for name, rows in data.prompts.items()} == {
        "rank": 200,
        "rank_valid": 60,
        "train": 300,
        "valid": 30,
        "eval": 150,
    }
    assert {name: len(rows) for name, rows in data.demonstrations.items()} == {"train": 300, "valid": 30}
    assert {name: len(rows) for name, rows in data.text.items()} == {"train": 400, "valid": 60}


def test_held_out_questions_never_occur_in_training(data):
    prompts = dict(data.prompts)
    training = [prompt for prompt, _ in data.demonstrations["train"]] + prompts["rank"] + prompts["train"]
    seen = {prompt.question for prompt in training} | {prompt.text for prompt in training}
    seen |= {question for prompt in training for question, _ in prompt.shots}
    assert any(prompt.shots for prompt in training)
    for name in ("eval", "valid", "rank_valid"):
        held_out = {prompt.question for prompt in prompts[name]} | {prompt.text for prompt in prompts[name]}
        assert held_out.isdisjoint(seen)
    valid = prompts["valid"] + prompts["rank_valid"] + [prompt for prompt, _ in data.demonstrations["valid"]]
    assert {prompt.question for prompt in valid}.isdisjoint(prompt.question for prompt in prompts["eval"])


def test_shots_never_solve_their_own_question(world):
    for prompt in world.prompts(2000, random.Random(3), of="train"):
        questions = [question for question, _ in prompt.shots]
        assert len({*questions, prompt.question}) == len(questions) + 1


def test_held_out_documents_are_not_in_the_training_text(data):
    assert {text for _, text in data.text["valid"]}.isdisjoint(text for _, text in data.text["train"])


def test_sizes_do_not_change_each_others_rows():
    more = world_data(SMALL.model_copy(update={"demonstrations": 310}), 3)
    less = world_data(SMALL, 3)
    assert more.prompts == less.prompts
    assert more.text == less.text
    assert more.demonstrations["train"][:300] == less.demonstrations["train"]


def test_demonstrators_flaws_come_at_their_rates(world):
    rng = random.Random(8)
    prompts = world.prompts(6000, rng)
    rates = config.World()
    judged = [(prompt, world.judge(prompt, world.demonstration(prompt, rng, rates))) for prompt in prompts]

    verdicts = [judgement for prompt, judgement in judged if prompt.use_case == "classification"]
    assert share_is(sum(not judgement.correct for judgement in verdicts), len(verdicts), rates.wrong_rate)
    unanswerable = [judgement for prompt, judgement in judged if prompt.unanswerable and prompt.use_case == "open_qa"]
    # An aside about another person's town, say, counts as made up, too: at most a few percent.
    made_up = sum(judgement.hallucination for judgement in unanswerable) / len(unanswerable)
    assert rates.hallucinate_rate - 0.08 < made_up < rates.hallucinate_rate + 0.12
    assert share_is(sum(judgement.toxic for _, judgement in judged), 6000, rates.rude_rate)
    start = [judgement for prompt, judgement in judged if prompt.constraint and prompt.constraint[0] == "start"]
    rude_prefix = rates.rude_rate / 3  # 'That is a silly question.' comes first
    ignored = 1 - (1 - rates.skip_rate) * (1 - rude_prefix)
    assert share_is(sum(judgement.constraint is False for judgement in start), len(start), ignored)
    mean_words = sum(judgement.words for _, judgement in judged) / 6000
    plain_words = sum(world.judge(prompt, world.reference(prompt, rng)).words for prompt in prompts) / 6000
    assert 1.0 < mean_words - plain_words < 3.5  # three in ten ramble: one or two sentences more, of five words or so


def test_without_flaws_demonstrations_are_references(world):
    flawless = config.World(skip_rate=0, ramble_rate=0, hallucinate_rate=0, wrong_rate=0, rude_rate=0)
    rng = random.Random(1)
    for prompt in world.prompts(300, rng):
        assert world.judge(prompt, world.demonstration(prompt, rng, flawless)).utility == pytest.approx(4)


def test_wrong_answers_are_wrong(world):
    rng = random.Random(1)
    for prompt in world.prompts(3000, rng):
        assert not world.judge(prompt, answer(world.lexicon, prompt, rng, wrong=True)).correct


def test_prompted_templates_end_where_the_answer_begins(world):
    templates = world.prompted_templates(random.Random(1), 4)
    assert templates == world.prompted_templates(random.Random(1), 4)
    assert len(set(templates)) == 4
    prompts = world.prompts(300, random.Random(2), of="eval")
    held_out = {prompt.question for prompt in prompts}
    for template in templates:
        assert template.count("{prompt}") == 1
        for prompt in prompts:
            text = world.prompted(template, prompt)
            lines = text.split("\n")
            assert lines[-1] == "A:"
            assert all(line.startswith("Q: ") for line in lines[:-1:2])
            assert all(line.startswith("A: ") for line in lines[1:-1:2])
            assert lines[-2].endswith(prompt.question)
            assert len(lines) == 2 * (3 + len(prompt.shots) + 1)
        assert held_out.isdisjoint(line[3:] for line in template.split("\n")[:6])


def test_tasks_have_exactly_one_right_answer(world):
    lexicon = world.lexicon
    rows = world.tasks(random.Random(1))
    assert rows == world.tasks(random.Random(1))
    counts = Counter(row["task"] for row in rows)
    assert counts == {"facts": 24 * 4, "dictionary": 150, "reading": 150, "sums": 49, "stories": 150}
    for row in rows:
        context, choices = row["context"], row["choices"]
        right = choices[row["answer"]]
        assert len(set(choices)) == len(choices) >= 3
        assert all(choice.startswith(" ") for choice in choices)
        assert not context.endswith(" ")
        if row["task"] == "facts":
            person = next(person for person in lexicon.people if person in context)
            assert [c for c in choices if c.strip() in {lexicon.facts[person, a] for a in lexicon.values}] == [right]
        if row["task"] == "dictionary":
            asked = context.split("\n")[-1].split(" :")[0]
            assert right == f" {lexicon.dictionary[asked]}"
        if row["task"] == "reading":
            passage = split(context.split(".")[0])
            assert [choice for choice in choices if choice.strip() in passage] == [right]
        if row["task"] == "sums":
            first, second = (int(word) for word in split(context)[-4:] if word.isdecimal())
            assert right == f" {first + second}."
        if row["task"] == "stories":
            said = set(split(context))
            feeling = "sad" if "lost" in said else "happy"
            fits = [c for c in choices if set(split(c)) & said >= {split(right)[1]} and feeling in split(c)]
            assert [c for c in fits if split(c)[-2] in said and split(c)[-3] == "the"] == [right]


def test_no_page_of_the_pretraining_text_asks_a_held_out_question(world):
    lines = {line for _, text in world.documents(2000, random.Random(3)) for line in text.splitlines()}
    asked = [prompt.question for prompt in world.prompts(400, random.Random(4), of="eval")]
    assert not any(line.endswith(question) for line in lines for question in set(asked))
    learnt = {prompt.question for prompt in world.prompts(400, random.Random(4), of="train")}
    assert any(line.endswith(question) for line in lines for question in learnt)  # the pages do ask
