"""Columns of a source: which of its values is which of ours, as a recipe says it.

A path finds a value inside a row: `prompt`, `info.post`, `completions[*].response` (of each entry),
`messages[0].content`, `messages[:-1]` (all but the last). A column whose name is the whole path comes first, so that
`a.b` may be a name.
A rule makes a value of ours:

- `PATH`, or `[PATH, PATH]`: several are joined, texts by a blank line, else into a list
- `{of: PATH, map: {THEIRS: OURS}, else: OURS}`: translated, entry by entry where the path has `[*]`
- `{scores: PATH}`: ranks from scores, the highest first, equal ones tied
- `{choice: PATH, first: 0}`: ranks from the number of the response that was chosen; `first` is that of the first
- `{each: PATH, as: {OURS: THEIRS}}`: a list of objects with our names, such as messages `{role, content}`
- `{dialogue: PATH}`: messages from text whose paragraphs begin with `Human:` and `Assistant:`
- `{text: "r/{info.subreddit}: {info.title}"}`: text with values in it; without any, a constant
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

Rule = str | tuple[str, ...] | dict[str, Any]
Step = str | int | slice | None  # a name, an index, a slice, or None for every entry

RULES = {
    "of": {"map", "else"},
    "scores": set(),
    "choice": {"first"},
    "each": {"as"},
    "dialogue": set(),
    "text": set(),
}
"""The kinds of rule, and what may stand beside each."""

CONDITIONS = ("not", "min", "max")
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\*|-?\d+|-?\d*:-?\d*)\]")
HOLE = re.compile(r"\{([^{}]*)\}")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Invalid(Exception):
    """What is wrong with one row."""


# ---- what a recipe may say


def rule(value: object) -> Rule:
    """A column's rule, checked; lists become tuples. Raises ValueError with one sentence."""
    if isinstance(value, str):
        steps(value)
        return value
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{brief(value)} must be a list of column names")
        return tuple(name for name in value if steps(name))
    if not isinstance(value, dict):
        raise ValueError(f"{brief(value)} must be a column's name, a list of names, or a rule such as {{of: NAME}}")
    kinds = [name for name in RULES if name in value]
    if len(kinds) != 1:
        raise ValueError(f"{brief(value)} must have one of {', '.join(RULES)}")
    (kind,) = kinds
    for name in value:
        if name not in RULES[kind] | {kind}:
            raise ValueError(f"a rule with {kind} has no {name!r}{nearest(str(name), RULES[kind])}")
    path = value[kind]
    if not isinstance(path, str) and not (kind in ("of", "scores") and isinstance(path, list | tuple)):
        raise ValueError(f"{kind}: {brief(path)} must be a column's name")
    checked = {**value, kind: path if kind == "text" else rule(path)}
    if kind == "text":
        for name in HOLE.findall(str(path)):
            steps(name)
    return checked | _options(kind, value)


def _options(kind: str, value: Mapping) -> dict[str, object]:
    if kind == "of" and "map" in value:
        if not isinstance(value["map"], dict):
            raise ValueError("map must be {THEIRS: OURS, ...}")
        return {"map": {word(theirs): ours for theirs, ours in value["map"].items()}}
    if kind == "choice":
        first = value.get("first", 0)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ValueError(f"first={first!r} must be a whole number: how the first response is numbered")
    if kind == "each":
        renamed = value.get("as")
        if not isinstance(renamed, dict) or not all(isinstance(name, str) and steps(name) for name in renamed.values()):
            raise ValueError("as must be {OURS: THEIRS, ...}, as in {each: turns, as: {role: from, content: value}}")
    return {}


def condition(value: object) -> object:
    """What a value must be: itself, one of a list, or {not: ...}, {min: ...}, {max: ...}. Raises ValueError."""
    if isinstance(value, dict):
        if not value or set(value) - set(CONDITIONS):
            raise ValueError(f"{brief(value)} must be a value, a list of values, or one of {', '.join(CONDITIONS)}")
        for name in ("min", "max"):
            bound = value.get(name, 0)
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise ValueError(f"{name}: {brief(bound)} must be a number")
        return {**value, "not": condition(value["not"])} if "not" in value else dict(value)
    if isinstance(value, list | tuple):
        if any(isinstance(entry, list | tuple | dict) for entry in value):
            raise ValueError(f"{brief(value)} must be a list of plain values")
        return tuple(value)
    return value


@cache
def steps(path: str) -> tuple[Step, ...]:
    """`completions[*].response` -> ("completions", None, "response"). Raises ValueError if it is no path."""
    found: list[Step] = []
    end = 0
    while end < len(path):
        match = STEP.match(path, end)
        if not match or (not found and match[1] is None):
            raise ValueError(f"{path!r} is no path; paths are as in info.post, completions[*].response, messages[0]")
        name, index = match.groups()
        if name is not None:
            found.append(name)
        elif ":" in index:
            found.append(slice(*(int(part) if part else None for part in index.split(":"))))
        else:
            found.append(None if index == "*" else int(index))
        end = match.end()
    if not found:
        raise ValueError("a column's name is empty")
    return tuple(found)


# ---- what a row has


def names(rule: Rule) -> Iterator[str]:
    """The paths that a rule reads, in their order."""
    if isinstance(rule, str):
        yield rule
    elif isinstance(rule, tuple):
        yield from rule
    elif "text" in rule:
        yield from HOLE.findall(str(rule["text"]))
    else:
        (kind,) = (name for name in RULES if name in rule)
        yield from names(rule[kind])


def head(path: str, values: Mapping[str, object]) -> str:
    """The column that a path begins with: the path itself where a column is named so."""
    return path if path in values else str(steps(path)[0])


def value(rule: Rule, values: Mapping[str, object], responses: int = 0) -> object:
    """What the rule makes of a row. Raises Invalid.

    Args:
        responses: how many responses the row has, for a rule with `choice`.
    """
    if isinstance(rule, str):
        return at(rule, values)
    if isinstance(rule, tuple):
        return [at(path, values) for path in rule]
    if "of" in rule:
        return _translated(rule, value(rule["of"], values))
    if "scores" in rule:
        return _ranks_of_scores(value(rule["scores"], values), str(rule["scores"]))
    if "choice" in rule:
        return _ranks_of_choice(rule, at(str(rule["choice"]), values), responses)
    if "each" in rule:
        return _renamed(rule, at(str(rule["each"]), values))
    if "dialogue" in rule:
        return _messages(at(str(rule["dialogue"]), values), str(rule["dialogue"]))
    return HOLE.sub(lambda hole: word(at(hole[1], values), ""), str(rule["text"]))


def at(path: str, values: Mapping[str, object], default: object = Invalid) -> object:
    """The value at a path; the default where there is none, or else Invalid."""
    if path in values:
        return values[path]
    try:
        return _follow(values, steps(path), path)
    except Invalid:
        if default is Invalid:
            raise
        return default


def _follow(found: object, rest: tuple[Step, ...], path: str) -> object:
    for number, step in enumerate(rest):
        if isinstance(step, str):
            if not isinstance(found, Mapping) or step not in found:
                hint = nearest(step, list(found)) if isinstance(found, Mapping) else ""
                raise Invalid(f"{path}: there is no {step!r}{hint} in {brief(found)}")
            found = found[step]
        elif not isinstance(found, list):
            raise Invalid(f"{path}: {brief(found)} is no list")
        elif step is None:
            return [_follow(entry, rest[number + 1 :], path) for entry in found]
        elif isinstance(step, slice) or -len(found) <= step < len(found):
            found = found[step]
        else:
            raise Invalid(f"{path}: the list has {len(found)} entries only")
    return found


def holds(conditions: Mapping[str, object], values: Mapping[str, object]) -> bool:
    """Whether a row meets all conditions. A value that is not there is null."""
    return all(_meets(at(path, values, None), wanted) for path, wanted in conditions.items())


def _meets(found: object, wanted: object) -> bool:
    if isinstance(wanted, Mapping):
        if "not" in wanted and _meets(found, wanted["not"]):
            return False
        low, high = wanted.get("min", -math.inf), wanted.get("max", math.inf)
        return ("min" not in wanted and "max" not in wanted) or low <= number(found) <= high
    return word(found) in [word(entry) for entry in (wanted if isinstance(wanted, tuple) else (wanted,))]


def _translated(rule: Mapping, found: object) -> object:
    if "map" not in rule:
        return found
    if isinstance(found, list):
        return [_translated(rule, entry) for entry in found]
    if word(found) in rule["map"]:
        return rule["map"][word(found)]
    if "else" in rule:
        return rule["else"]
    raise Invalid(f"{rule['of']} is {brief(found)}, which is none of {', '.join(rule['map'])}")


def _ranks_of_scores(found: object, path: str) -> list[int]:
    if not isinstance(found, list):
        raise Invalid(f"{path} is {brief(found)}, but must be a list of scores")
    scores = [number(score) for score in found]
    for score, as_number in zip(found, scores, strict=True):
        if not math.isfinite(as_number):
            raise Invalid(f"{path} holds {brief(score)}, but a score is a finite number")
    return [1 + sum(other > score for other in scores) for score in scores]


def _ranks_of_choice(rule: Mapping, found: object, responses: int) -> list[int]:
    first = rule.get("first", 0)
    chosen = number(found) - first
    if chosen not in range(responses):
        last = first + responses - 1
        raise Invalid(f"{rule['choice']} is {brief(found)}, but must be the number of a response, {first} to {last}")
    return [1 if place == chosen else 2 for place in range(responses)]


def _renamed(rule: Mapping, found: object) -> list[dict[str, object]]:
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise Invalid(f"{rule['each']} is {brief(found)}, but must be a list of objects")
    return [{ours: at(theirs, entry) for ours, theirs in rule["as"].items()} for entry in found]


def _messages(found: object, path: str) -> list[dict[str, str]]:
    if not isinstance(found, str):
        raise Invalid(f"{path} is {brief(found)}, but must be a string")
    before, *turns = TURN.split(found.rstrip())
    if before.strip() or not turns:
        raise Invalid(f"{path} does not begin with 'Human:' or 'Assistant:'")
    said = [{"role": role.lower(), "content": text.strip()} for role, text in zip(turns[::2], turns[1::2], strict=True)]
    return said[:-1] if said[-1] == {"role": "assistant", "content": ""} else said  # the turn that is to be answered


def number(value: Any) -> float:
    """A number, or a string of one; else nan."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def word(value: object, null: str = "null") -> str:
    """How values are compared, whatever format they come in: true, `true` and "true"; 1, 1.0 and "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return null
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def nearest(name: str, known: Iterable[object]) -> str:
    """` (did you mean 'prompt'?)`, or nothing."""
    near = get_close_matches(name, [str(other) for other in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def brief(value: object) -> str:
    """A value on half a line."""
    if value is None:
        return "null"
    text = repr(value) if not isinstance(value, str) or len(value) < 60 else repr(value[:60])
    return text if len(text) <= 60 else f"{text[:57]}..."
