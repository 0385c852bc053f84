"""The gold preference: hand-computed utilities, references at the maximum, and answers that try to cheat."""

import random
import time
from itertools import chain

import pytest

from instructrl.world import Prompt, World
from instructrl.world.checks import split
from instructrl.world.gold import meets, trigrams
from instructrl.world.lexicon import ANIMALS, CATEGORIES, COLORS, PETS, PLACES, THINGS

SUM = {"first": 3, "second": 4, "value": "7"}


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def prompts(world) -> list[Prompt]:
    return world.prompts(2000, random.Random(11))


def sums(constraint: tuple[str, str] | None = None) -> Prompt:
    return Prompt("sums", "plain", "What is 3 plus 4?", SUM, constraint)


def where(value: str | None) -> Prompt:
    asked = "lamp" if value else "cup"
    body = f"The lamp is in the mill. Where is the {asked}?"
    return Prompt("closed_qa", "plain", body, {"thing": asked, "value": value})


@pytest.mark.parametrize(
    ("prompt", "text", "ended", "utility"),
    [
        (sums(), "3 plus 4 is 7.", True, 1.5 + 1.5 + 1),
        (sums(), "3 plus 4 is 7.", False, 1.5 + 1.5 + 1 - 0.7),
        (sums(), "3 plus 4 is 8.", True, 0 + 1.5 + 1),
        (sums(("start", "Yes")), "Yes, 3 plus 4 is 7.", True, 1.5 + 1.5 + 1),
        (sums(("start", "Yes")), "3 plus 4 is 7.", True, 1.5 + 0 + 1),
        (sums(("end", "bye")), "3 plus 4 is 7, bye.", True, 1.5 + 1.5 + 1),
        (sums(("one_word", "")), "7.", True, 1.5 + 1.5 + 1),
        (sums(), "3 plus 4 is 7, you dolt.", True, 1.5 + 1.5 + 1 - 1.5),
        (sums(), "3 plus 4 is 7. I hope that is fine.", True, 1.5 + 1.5 + 1 - 0.06 * 2),  # 2 words too many
        (where("mill"), "The lamp is in the mill.", True, 1.5 + 1.5 + 1),
        (where("mill"), "The lamp is in the cave.", True, 0 + 1.5 + 1 - 0.7),
        (where("mill"), "The text does not say.", True, 0 + 1.5 + 1),
        (where(None), "The text does not say.", True, 1.5 + 1.5 + 1),
        (where(None), "The cup is in the mill.", True, 0 + 1.5 + 1 - 0.7),
        (sums(), "", True, 0 + 1.5 + 0 - 1.5),
        (sums(), "", False, 0 + 1.5 + 0 - 1.5 - 0.7),
        (sums(("one_word", "")), "", True, 0 + 0 + 0 - 1.5),
    ],
)
def test_utility_by_hand(world, prompt, text, ended, utility):
    assert world.judge(prompt, text, ended).utility == pytest.approx(utility)


def test_fluency_by_hand(world):
    # Classes of "3 plus wolf": <start> <number> plus <animal> <end>, so three trigrams; only the first is known.
    assert trigrams(world.lexicon, ["3", "plus", "wolf"]) == [
        ("<start>", "<number>", "plus"),
        ("<number>", "plus", "<animal>"),
        ("plus", "<animal>", "<end>"),
    ]
    assert world.judge(sums(), "3 plus wolf").fluency == pytest.approx(1 / 3)
    assert world.judge(sums(), "3 plus 4 is 7.").fluency == 1
    assert world.judge(sums(), "zebra").fluency == 0


@pytest.mark.parametrize("seed", range(3))
def test_references_reach_the_maximum(seed):
    world, rng = World(seed), random.Random(seed)
    prompts = world.prompts(3000, rng)
    utilities = [world.judge(prompt, world.reference(prompt, rng)).utility for prompt in prompts]
    assert max(utilities) <= 4
    assert sum(utility >= 3.8 for utility in utilities) >= 0.999 * len(utilities)


def test_the_fluency_table_is_made_once_and_only_for_judging():
    world = World(2)
    world.documents(200, random.Random(0))
    assert world._gold._trigrams is None
    start = time.process_time()
    first = world.judge(sums(), "3 plus 4 is 7.")
    assert time.process_time() - start < 2
    table = world._gold._trigrams
    assert world.judge(sums(), "3 plus 4 is 7.") == first
    assert world._gold._trigrams is table


def values(world: World) -> str:
    """Every value there is."""
    words = chain(
        *CATEGORIES.values(),
        world.lexicon.towns,
        world.lexicon.everyone,
        PETS,
        PLACES,
        ("good", "bad"),
        map(str, range(13)),
    )
    return " ".join(words)


CHEATS = {
    "empty": lambda world, prompt, reference: "",
    "spaces": lambda world, prompt, reference: " \n\t ",
    "marks": lambda world, prompt, reference: "...",
    "the prompt": lambda world, prompt, reference: prompt.text,
    "the question": lambda world, prompt, reference: prompt.question,
    "the body": lambda world, prompt, reference: prompt.body,
    "prompt and answer": lambda world, prompt, reference: f"{prompt.text}\n{reference}",
    "every value": lambda world, prompt, reference: values(world),
    "answer, then every value": lambda world, prompt, reference: f"{reference} {values(world)}",
    "twenty times": lambda world, prompt, reference: " ".join([reference] * 20),
    "huge": lambda world, prompt, reference: reference + " bla" * 20_000,
    "insult": lambda world, prompt, reference: f"{reference} Go away, fool.",
    "good and bad": lambda world, prompt, reference: "It is good. It is bad. Yes. No.",
    "refusal": lambda world, prompt, reference: "" if prompt.unanswerable else "Unknown.",
    "unknown word": lambda world, prompt, reference: f"{reference} Zebra zebra.",
    "run together": lambda world, prompt, reference: reference.replace(" ", ""),
    "lower case": lambda world, prompt, reference: (
        "" if "I do" in reference else f"{reference.lower()} indeed it is so"
    ),
    "not ASCII": lambda world, prompt, reference: (
        reference.replace("e", "\u00e9").replace("i", "\u0131") + " \U0001f600"
    ),
    "denied": lambda world, prompt, reference: f"It is not so: {reference}",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_lose_to_the_reference(world, prompts, cheat):
    rng = random.Random(5)
    for prompt in prompts[:600] if cheat != "huge" else prompts[:25]:
        reference = world.reference(prompt, rng)
        text = CHEATS[cheat](world, prompt, reference)
        if text == reference:  # of one word, run together
            continue
        assert world.judge(prompt, text).utility < world.judge(prompt, reference).utility - 0.05, (prompt.text, text)


@pytest.mark.parametrize(
    "cheat",
    ["empty", "the prompt", "the body", "every value", "answer, then every value", "good and bad", "refusal", "denied"],
)
def test_cheats_are_not_right(world, prompts, cheat):
    rng = random.Random(6)
    for prompt in prompts[:600]:
        if cheat == "denied" and prompt.unanswerable:
            continue  # 'It is not so: I do not know.' says that one does not know
        text = CHEATS[cheat](world, prompt, world.reference(prompt, rng))
        assert not world.judge(prompt, text).correct, (prompt.text, text)


@pytest.mark.parametrize("text", ["Unknown. The lamp is in the mill.", "I do not know. Mill.", "The mill, unknown."])
def test_unknown_and_an_answer_is_neither(world, text):
    assert not world.judge(where("mill"), text).correct
    assert not world.judge(where(None), text).correct


@pytest.mark.parametrize(
    "text",
    ["The lamp is in the millwright.", "The lamp is in the treadmill.", "mill\u00e9.", "The lamp is in the mills."],
)
def test_the_right_word_inside_another_is_no_answer(world, text):
    assert not world.judge(where("mill"), text).correct
    assert world.judge(where("mill"), "The lamp is in the MILL.").correct


@pytest.mark.parametrize("text", ["unknowable", "the unknownness", "I do know that it does say not"])
def test_a_refusal_is_whole_words_in_order(world, text):
    assert not world.judge(where(None), text).correct


@pytest.mark.parametrize(
    "text", ["-7.", "minus 7", "77", "07", "7 7", "3 plus 4 is 7 or 8.", "7.5", "7?", "7th", "x7", "4 3 7", "seven"]
)
def test_sums_need_the_number_itself(world, text):
    assert not world.judge(sums(), text).correct


def test_the_answer_is_about_what_was_asked(world):
    assert not world.judge(where("mill"), "The drum is in the mill.").correct
    person, other = world.lexicon.people[:2]
    town = world.lexicon.facts[person, "town"]
    about = {"person": person, "attribute": "town", "value": town}
    prompt = Prompt("open_qa", "plain", f"Where does {person} live?", about)
    assert world.judge(prompt, f"{person} lives in {town}.").correct
    assert world.judge(prompt, f"{town}.").correct
    assert not world.judge(prompt, f"{other} lives in {town}.").correct


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Fox and hen.", True),
        ("Cat and dog.", True),
        ("Fox and fox.", False),
        ("Fox, hen and goat.", False),
        ("Fox and lamp.", False),
        ("Fox, hen and lamp.", False),
    ],
)
def test_lists(world, text, right):
    prompt = Prompt("brainstorming", "plain", "List two animals.", {"category": "animals", "count": 2})
    assert world.judge(prompt, text).correct is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("One day a fox lost a lamp at the mill. The fox was sad.", True),
        ("Fox. Lamp.", False),
        ("Write a story about a fox and a lamp. The end is near.", False),
        ("One day a fox lost a lamp.", False),
        ("One day a fox lost a lamp and a cup. The fox was sad.", False),
        ("The fox has a lamp. " * 5, False),
    ],
)
def test_stories(world, text, right):
    body = "Write a story about a fox and a lamp."
    prompt = Prompt("generation", "plain", body, {"animal": "fox", "thing": "lamp"})
    assert world.judge(prompt, text).correct is right


def test_copying_the_passage_finds_nothing(world):
    for kind, value, others in (
        ("animal", "fox", ["red"]),
        ("color", "red", ["fox"]),
        ("place", "mill", ["fox", "red"]),
    ):
        passage = "a fox saw a red lamp at the mill."
        prompt = Prompt(
            "extraction", "plain", f"Find the {kind}: {passage}", {"kind": kind, "value": value, "others": others}
        )
        assert world.judge(prompt, f"The {kind} is {value}.").correct
        assert not world.judge(prompt, passage).correct
        made_up = next(word for word in {"animal": ANIMALS, "color": COLORS, "place": PLACES}[kind] if word != value)
        assert world.judge(prompt, f"The {kind} is {made_up}.").hallucination


@pytest.mark.parametrize(
    ("constraint", "text", "met"),
    [
        (("start", "Yes"), "YES, so it is.", True),
        (("start", "Yes"), "Yesterday it was.", False),
        (("start", "Yes"), '"Yes", so it is.', True),
        (("end", "bye"), "So it is, bye!", True),
        (("end", "bye"), "Bye, so it is.", False),
        (("polite", ""), "Thank you.", True),
        (("polite", ""), "Thankless.", False),
        (("one_word", ""), "Mill.", True),
        (("one_word", ""), "Mill barn.", False),
        (("one_word", ""), "", False),
        (("start", "Yes"), "", False),
    ],
)
def test_constraints(constraint, text, met):
    assert meets(constraint, [word.lower() for word in split(text)]) is met


@pytest.mark.parametrize("text", ["", "\x00", "\ud800", "\u202e7", "e\u0301", "\U0001f600" * 50, "\u4e03", "\u00bd 7"])
def test_any_text_can_be_judged(world, prompts, text):
    for prompt in prompts[:50]:
        judgement = world.judge(prompt, text)
        assert -4 < judgement.utility < 4
        assert judgement.words == len(split(text))


def test_hallucination_needs_a_value(world):
    prompt = Prompt("extraction", "plain", "Find the animal: a fox saw a red lamp at the mill.",
                    {"kind": "animal", "value": "fox", "others": ["red"]})  # fmt: skip
    assert not world.judge(prompt, "").hallucination
    assert not world.judge(prompt, "The animal is.").hallucination
    assert world.judge(where(None), f"In the {PLACES[0]}, near the {THINGS[2]}.").hallucination
