"""The tiny world as one object: its text, prompts, answers, gold preference and public tasks."""

import random
from collections.abc import Set
from typing import TYPE_CHECKING

from instructrl.world import answers, documents, prompts, tasks
from instructrl.world.gold import Gold, Judgement
from instructrl.world.lexicon import Lexicon
from instructrl.world.prompts import Prompt

if TYPE_CHECKING:
    from instructrl.config import World as Rates

_FIRST_SHOTS = ("open_qa", "brainstorming", "rewriting")


class World:
    """A world made from a seed: equal arguments give equal bytes, in any process.

    Args:
        seed: of the names, the facts and the dictionary.
        people: how many people there are facts about.
        strangers: how many people are only known by name.
    """

    def __init__(self, seed: int, people: int = 24, strangers: int = 8):
        self.lexicon = Lexicon(seed, people, strangers)
        self._gold = Gold(self.lexicon)

    def documents(self, n: int, rng: random.Random, *, exclude: Set[str] = frozenset()) -> list[tuple[str, str]]:
        """`n` pretraining documents (kind, text) whose texts are not in `exclude`."""
        made: list[tuple[str, str]] = []
        while len(made) < n:
            kind, text = documents.document(self.lexicon, rng)
            if text not in exclude:
                made.append((kind, text))
        return made

    def prompts(self, n: int, rng: random.Random, *, of: str | None = None, unique: bool = False) -> list[Prompt]:
        """`n` prompts whose questions belong to the part `of` (train, valid or eval; None: any).

        With `unique`, a text comes a second time only where its use case, kind and constraint have no other left:
        the mix of prompts comes before their variety.
        """
        made: list[Prompt] = []
        seen: set[str] = set()
        for _ in range(n):
            made.append(prompts.draw(self.lexicon, rng, of=of, seen=seen))
            if unique:
                seen.add(made[-1].text)
        return made

    def part(self, prompt: Prompt) -> str:
        """train, valid or eval: where the prompt's question belongs (see `prompts.part`)."""
        return prompts.part(self.lexicon, prompt.question)

    def reference(self, prompt: Prompt, rng: random.Random) -> str:
        """A flawless answer."""
        return answers.answer(self.lexicon, prompt, rng)

    def demonstration(self, prompt: Prompt, rng: random.Random, rates: "Rates") -> str:
        """A demonstrator's answer, with flaws at the rates of `config.World`."""
        return answers.demonstration(self.lexicon, prompt, rng, rates)

    def judge(self, prompt: Prompt, text: str, ended: bool = True) -> Judgement:
        """The gold preference's judgement of an answer; `ended`: the model ended it by itself."""
        return self._gold.judge(prompt, text, ended)

    def tasks(self, rng: random.Random) -> list[dict]:
        """The public tasks: rows {task, context, choices, answer}."""
        return tasks.tasks(self.lexicon, rng)

    def prompted_templates(self, rng: random.Random, n: int) -> list[str]:
        """`n` frames for GPT (prompted): three solved questions in the web's form, then `{prompt}`; stop at a newline.

        The first has an open question, a list and a polite request; the others draw their use cases.
        """
        templates = []
        while len(templates) < n:
            chosen = rng.sample(tuple(prompts.USE_CASES), 3) if templates else _FIRST_SHOTS
            shots = [self._shot(use_case, rng) for use_case in chosen]
            templates.append("".join(f"Q: {question}\nA: {answer}\n" for question, answer in shots) + "Q: {prompt}\nA:")
        return templates

    def prompted(self, template: str, prompt: Prompt) -> str:
        """The template around a prompt. A few-shot prompt's own shots take the same form: Q:, A:, Q:, A:, Q:."""
        if not prompt.shots:
            return template.replace("{prompt}", prompt.text)
        shots = "".join(f"{question}\nA: {answer}\nQ: " for question, answer in prompt.shots)
        return template.replace("{prompt}", shots + prompt.question)

    def _shot(self, use_case: str, rng: random.Random) -> tuple[str, str]:
        while True:
            prompt = prompts.draw(self.lexicon, rng, of="train", use_case=use_case, simple=True)
            if not prompt.unanswerable:
                return prompt.question, self.reference(prompt, rng)
