"""Adapters: what a public data set's columns are called, as a file of `conf/adapters` for each set.

An adapter is part of a `Source`, once for each kind of table that the set can give; what the recipe says wins.
It is filled in while the recipe is checked, so that a plan, a fingerprint and a data card show what was really read.
"""

from collections.abc import Mapping
from functools import cache

import yaml
from pydantic import BaseModel

KINDS = ("demonstrations", "rankings", "prompts", "text")
MERGED = ("columns", "where")  # key by key; of everything else the recipe's value replaces the adapter's


def expanded(source: object, kind: str) -> object:
    """A source as a recipe gives it -> the same with its adapter's keys; what has no adapter as it is.

    Args:
        kind: `demonstrations`, `rankings`, `prompts`, `text` or `labels`.

    Raises:
        ValueError: there is no such adapter, or it has nothing of this kind.
    """
    values = source.model_dump(exclude_unset=True) if isinstance(source, BaseModel) else source
    if not isinstance(values, Mapping) or not isinstance(values.get("adapter"), str):
        return source
    name = values["adapter"]
    if name not in adapter_names():
        raise ValueError(f"there is no adapter {name!r}.{_meant(name)} There is {_listed(adapter_names())}")
    adapter = adapter_file(name)
    has = [other for other in KINDS if other in adapter]
    if kind not in has:
        raise ValueError(f"the adapter {name!r} has no {kind}; it has {_listed(has)}")
    common = {key: value for key, value in adapter.items() if key not in KINDS}
    filled = common | adapter[kind]
    if values.get("path", filled["path"]) != filled["path"]:
        filled.pop("revision", None)  # that of another repository
    merged = {key: {**filled.get(key, {}), **values[key]} for key in MERGED if isinstance(values.get(key), Mapping)}
    return filled | dict(values) | merged


def adapter_names() -> list[str]:
    """The shipped adapters."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


@cache
def adapter_file(name: str) -> dict:
    """The keys of an adapter: those of a `Source`, and for each kind of table those that differ."""
    return yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))


def _folder():
    from instructrl.recipe_files import shipped  # which imports the schema, which asks here

    return shipped("conf") / "adapters"


def _meant(name: str) -> str:
    from instructrl.keys import closest, did_you_mean

    near = closest(name, adapter_names())
    return did_you_mean([near] if near else [])


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
