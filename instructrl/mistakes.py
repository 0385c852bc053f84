"""What is wrong with a composed recipe, each mistake as one sentence with its key, file and line."""

import itertools
import math
import re
from collections.abc import Iterator

from pydantic_core import ErrorDetails

from instructrl.keys import dotted, kind_of, section_of, suggestion
from instructrl.overrides import is_given
from instructrl.recipe_files import Location, RecipeFiles


def not_finite(value: object, location: tuple[str | int, ...] = ()) -> Iterator[tuple[Location, float]]:
    """Every nan and infinity: no setting of a recipe can mean one."""
    if isinstance(value, float) and not math.isfinite(value):
        yield location, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from not_finite(inner, (*location, name))


def explain_number(location: Location, number: float, files: RecipeFiles, given: tuple[str, ...]) -> str:
    """One nan or infinity as one sentence."""
    where = "" if is_given(location, given) else files.where(location)
    return f"{where}{dotted(location)}={number}: must be a finite number."


def explain(problem: ErrorDetails, files: RecipeFiles, given: tuple[str, ...]) -> str:
    """One of pydantic's findings as one sentence."""
    location, kind = problem["loc"], problem["type"]
    key, spelt = dotted(location), ".".join(str(part) for part in location)
    where = "" if is_given(location, given) else files.where(location)
    section = section_of(kind_of(str(part) for part in location))
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where}{'t' if where else 'T'}here is no key {spelt!r}.{suggestion(spelt)}"
    if kind == "missing":
        where = where or files.where(location[:-1])
        return f"{where}{key} is missing."
    if kind == "value_error":
        message = str(problem["ctx"]["error"]).rstrip(".")
        where = "" if given and mentions(message, location, given) else place(message, location, files)
        return f"{where}{'' if not key or message.startswith(key) else f'{key}: '}{message}."
    if section and not isinstance(problem["input"], dict):
        return f"{where}{key}={brief(problem['input'])}: {key} is a section; it has {', '.join(section.model_fields)}."
    message = problem["msg"].rstrip(".")
    return f"{where}{key}={brief(problem['input'])}: {message[0].lower()}{message[1:]}."


def keys_in(message: str, location: Location) -> Iterator[list[str | int]]:
    """The recipe's keys that a message names, as locations: `sft.epochs`, or `epochs` inside the section."""
    for word in re.findall(r"[a-z_][\w.]*\w", message):
        for parts in ([*location, *word.split(".")], word.split(".")):
            if kind_of(str(part) for part in parts) is not None:
                yield parts


def mentions(message: str, location: Location, given: tuple[str, ...]) -> bool:
    """Whether the first key that the message names was set on the command line."""
    return any(is_given(parts, given) for parts in itertools.islice(keys_in(message, location), 1))


def place(message: str, location: Location, files: RecipeFiles) -> str:
    """The file and line of the first key that the message names and a file sets, else of the section."""
    places = (files.where(parts) for parts in keys_in(message, location))
    return next(filter(None, places), "") or (files.where(location) if location else "")


def brief(value: object) -> str:
    """A value on half a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
