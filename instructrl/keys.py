"""The keys of the schema: which exist, and the nearest to one that does not."""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from instructrl.config import Recipe


def every_key(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key that holds a value, dotted: `["name", "seed", "model.path", ...]`; those of listed sources left out."""
    keys = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        keys += every_key(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def exists(key: str) -> bool:
    """Whether the schema has the key or section: `sft`, `sft.epochs`, `data.rankings.0.path`, `sft.trainer.any`."""
    return kind_of(key.split(".")) is not None


def kind_of(parts: Iterable[str], kind: object = Recipe) -> object | None:
    """The annotation of the key with these parts; None where there is no such key."""
    for part in parts:
        kind = bare(kind)
        section, origin = section_of(kind), typing.get_origin(kind)
        if section:
            field = section.model_fields.get(part)
            kind = field.annotation if field else None
        elif origin is tuple and part.isdigit():
            kind = typing.get_args(kind)[0]
        elif origin is dict and part:
            value = typing.get_args(kind)[1]
            kind = kind if bare(value) is typing.Any else value
        else:
            return None
    return kind


def section_of(kind: object) -> type[BaseModel] | None:
    """The section behind an annotation: `World` for `World | None`; None for anything but a section."""
    kind = bare(kind)
    if isinstance(kind, types.UnionType):
        kind = next((option for option in typing.get_args(kind) if option is not types.NoneType), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def bare(kind: object) -> object:
    """The annotation without what checks it: `Source` for `Annotated[Source, ...]`."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def dotted(location: Sequence[str | int]) -> str:
    """`("data", "rankings", 0, "path")` -> `data.rankings[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def suggestion(key: str) -> str:
    """` Did you mean sft.learning_rate?`, or the keys that the section has, or nothing when no key is near."""
    close = nearest(key)
    if close:
        return did_you_mean(close)
    parent = key.rpartition(".")[0]
    section = section_of(kind_of(parent.split("."))) if parent else None
    return f" {parent} has {', '.join(section.model_fields)}." if section else ""


def did_you_mean(close: Sequence[str]) -> str:
    """` Did you mean a or b?`, or nothing."""
    shown = [*close[:3], "..."] if len(close) > 3 else close
    return f" Did you mean {' or '.join(shown)}?" if close else ""


def nearest(key: str) -> list[str]:
    """The keys that were probably meant: every part corrected, else the same last part in other sections."""
    path, kind = [], Recipe
    *parents, last = key.split(".")
    for part in parents:
        section = section_of(kind)
        match = closest(part, section.model_fields) if section else part
        kind = kind_of([match], kind) if match else None
        if kind is None:
            break
        path.append(match)
    else:
        section = section_of(kind)
        found = similar(last, section.model_fields) if section else [last] if kind_of([last], kind) else []
        if found:
            return [".".join([*path, name]) for name in found]
    leaf = key.rpartition(".")[2]
    known = every_key()
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    match = None if same or path else closest(leaf, {name.rpartition(".")[2] for name in known})
    return same or [name for name in known if name.rpartition(".")[2] == match]


def closest(word: str, names: Iterable[str]) -> str | None:
    """The only name that is `similar`."""
    close = similar(word, names)
    return close[0] if len(close) == 1 else None


def similar(word: str, names: Iterable[str]) -> list[str]:
    """The name itself, else the most similar one, else all that have the word as one of their words."""
    names = list(names)
    close = [word] if word in names else difflib.get_close_matches(word, names, n=1, cutoff=0.65)
    return close or [name for name in names if word in name.split("_")]
