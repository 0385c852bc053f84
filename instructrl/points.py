"""The recipes of a sweep. Hydra composes the first; most others differ from it in values that are put in their place.

Hydra takes a fifth of a second for a recipe, which would make minutes of a sweep over 500 seeds.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from instructrl.overrides import parse_override, sweep_values
from instructrl.recipe import Composition, Draft, compose_recipe, draft
from instructrl.recipe_files import RecipeFiles

REFERENCE = re.compile(r"\$\{(?!oc\.env:[^${}]*\})")


@dataclass(frozen=True)
class Choice:
    """One value of one argument. `key` is "" for an argument that is not swept, and for recipe=."""

    argument: str
    key: str = ""
    value: Any = None


def compose_points(arguments: list[str]) -> Iterator[tuple[list[str], Composition]]:
    """Every combination of `key=a,b` values, in the order of Hydra's --multirun: its arguments and its recipe.

    Raises:
        UserError: an argument cannot be read, or a recipe is wrong.
    """
    begun: dict[str, Draft | None] = {}  # recipe= -> what its points are copied from
    for point in combinations(arguments):
        spelt = [choice.argument for choice in point]
        swept = [choice for choice in point if choice.key]
        recipe = next((argument for argument in spelt if argument.startswith("recipe=")), "")
        if recipe not in begun:
            first = draft(spelt)
            begun[recipe] = first if swept and can_copy(first, point) else None
            if begun[recipe] is None:
                yield spelt, first.check()
                continue
        base = begun[recipe]
        yield spelt, (with_values(base, swept) if base else None) or compose_recipe(spelt)


def combinations(arguments: list[str]) -> Iterator[tuple[Choice, ...]]:
    """The arguments of each point, the last argument varying fastest."""
    return itertools.product(*(list(choices(argument)) for argument in arguments))


def choices(argument: str) -> Iterator[Choice]:
    """The values of one argument."""
    if argument.startswith("recipe="):
        yield from (Choice(f"recipe={name}") for name in argument.removeprefix("recipe=").split(","))
        return
    override = parse_override(argument)
    if not override.is_sweep_override():
        yield Choice(argument)
        return
    for text, value in sweep_values(override, argument):
        yield Choice(f"{override.key_or_group}={text}", override.key_or_group, value)


def can_copy(first: Draft, point: Sequence[Choice]) -> bool:
    """Whether a point's values may be put where the first point's are.

    Not if one is the choice of a config group, if another argument sets the same key or a part of it, or if anything
    refers to other values (`${seed}`).
    """
    keys = [choice.key or choice.argument.partition("=")[0] for choice in point]
    alone = all(not (f"{one}.").startswith(f"{other}.") for one, other in itertools.permutations(keys, 2))
    groups = any(first.files.is_group(choice.key) for choice in point if choice.key)
    return alone and not groups and not first.problems and not refers(first.files, point)


def refers(files: RecipeFiles, point: Sequence[Choice]) -> bool:
    """Whether a file or an argument refers to a value of the recipe, and not only to the environment's."""
    tokens = (token for file in files.files for token in yaml.scan(file.path.read_text(), Loader=yaml.SafeLoader))
    scalars = (token.value for token in tokens if isinstance(token, yaml.ScalarToken))
    return any(REFERENCE.search(text) for text in itertools.chain(scalars, (choice.argument for choice in point)))


def with_values(base: Draft, swept: Sequence[Choice]) -> Composition | None:
    """The recipe with these values; None if Hydra has to say what they mean."""
    values = copied(base.values)
    for choice in swept:
        *parents, last = choice.key.split(".")
        section: Any = values
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        plain = choice.value is None or isinstance(choice.value, int | float | str)
        if not plain or not isinstance(section, dict) or isinstance(section.get(last), dict):
            return None
        if isinstance(choice.value, str) and ("${" in choice.value or choice.value == "???"):
            return None
        section[last] = choice.value
    return replace(base, values=values).check()


def copied(value: Any) -> Any:
    """A copy of dicts, lists and what they hold, in a quarter of `deepcopy`'s time."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value
