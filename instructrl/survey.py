"""A store as it is while a command plans: each file is read once, however many recipes a sweep has."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructrl.artifacts import MANIFEST, Artifact, Store, read_json
from instructrl.config import Recipe
from instructrl.key import Key, Location, Where, canonical, fingerprint, local_contents
from instructrl.stages import sources

NEWEST = 20  # of a stage's artifacts, that are read for an estimate of its time


@dataclass(frozen=True)
class Estimate:
    """How long a stage takes, and how much memory, by an artifact of an earlier run."""

    seconds: float
    of: str  # the artifact's fingerprint
    same_recipe: bool
    memory: int | None = None  # bytes that it took at most


class Survey(Store):
    """Reads a store for plans. Never ask it about what may have changed since it was made."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.found: dict[tuple[str, str], tuple[Artifact | None, str]] = {}
        self.folders: dict[str, Collection[str]] = {}
        self.last: dict[str, dict[str, dict[str, Any]]] = {}
        self.contents: dict[tuple[str, ...], dict[Location, str]] = {}
        self.packages: dict[str, dict[str, str]] = {}
        self.checked: set[str] = set()
        self.estimates: dict[tuple[str, str], Estimate | None] = {}

    def look(self, stage: str, key: dict[str, Any]) -> tuple[Artifact | None, str]:
        """As `Store.look`."""
        place = (stage, fingerprint(key))
        if place not in self.found:
            self.found[place] = super().look(stage, key) if place[1] in self.names(stage) else (None, "")
            self.share_packages(self.found[place][0])
        return self.found[place]

    def share_packages(self, artifact: Artifact | None) -> None:
        """Keep one list of packages for all artifacts made with the same: it is most of a manifest."""
        if artifact and "packages" in artifact.made:
            packages = artifact.made["packages"]
            artifact.made["packages"] = self.packages.setdefault(canonical(packages), packages)

    def names(self, stage: str) -> Collection[str]:
        """The names in the stage's folder."""
        if stage not in self.folders:
            self.folders[stage] = listed(self.root / stage)
        return self.folders[stage]

    def latest(self, recipe: str) -> dict[str, dict[str, Any]]:
        """As `Store.latest`."""
        if recipe not in self.last:
            self.last[recipe] = {stage: Key(key) for stage, key in super().latest(recipe).items()}
        return self.last[recipe]

    def local_contents(self, recipe: Recipe, sections: Collection[str], where: Where) -> dict[Location, str]:
        """As `key.local_contents`; files that two recipes name are hashed once."""
        named = (recipe.data.model_dump_json(), canonical(recipe.eval.labels and recipe.eval.labels.model_dump()))
        what = (*named, str(recipe.model.path), *sorted(sections))
        if what not in self.contents:
            self.contents[what] = local_contents(recipe, sections, self.hashes, where)
            self.hashes.save()
        return self.contents[what]

    def check_sources(self, recipe: Recipe) -> None:
        """As `sources.check`; what two recipes name alike is checked once."""
        what = recipe.model_dump_json(include={"model", "data", "eval"})
        if what not in self.checked:
            sources.check(recipe)
            self.checked.add(what)

    def estimate(self, recipe: str, stage: str, key: dict[str, Any]) -> Estimate | None:
        """How long the stage took: in the recipe's last run; else in the run of any recipe that is most like it.

        All points of a sweep have the estimate of the first that asks.
        """
        if (recipe, stage) not in self.estimates:
            last = self.latest(recipe).get(stage)
            made = self.made(stage, fingerprint(last)) if last else {}
            mine = made.get("seconds")
            found = Estimate(mine, fingerprint(last), True, made.get("memory")) if last and mine is not None else None
            self.estimates[recipe, stage] = found or self.most_like(stage, key)
        return self.estimates[recipe, stage]

    def most_like(self, stage: str, key: dict[str, Any]) -> Estimate | None:
        """By the artifact, of the newest twenty, whose settings differ least from the key's; of equals the newest."""
        wanted = set(settings(key))
        best, least = None, None
        for name in newest(self.root / stage, NEWEST):
            manifest = read_json(self.root / stage / name / MANIFEST)
            made, theirs = manifest.get("made", {}), manifest.get("key")
            seconds = made.get("seconds")
            if seconds is None or not isinstance(theirs, dict):
                continue
            apart = len(wanted.symmetric_difference(settings(theirs)))
            if least is None or apart < least:
                best, least = Estimate(seconds, name, False, made.get("memory")), apart
        return best

    def made(self, stage: str, name: str) -> dict[str, Any]:
        """How the artifact of this fingerprint came about; {} if there is none."""
        return read_json(self.root / stage / name / MANIFEST).get("made", {})


def settings(key: dict[str, Any]) -> list[tuple[str, str]]:
    """What the key says of the recipe, flat: `("sft.epochs", "2")`."""
    return list(flat(key.get("config", {}), ""))


def flat(value: object, path: str) -> Any:
    """Every value that is no mapping, with its dotted name."""
    if not isinstance(value, dict):
        yield path, repr(value)
        return
    for name, inner in value.items():
        yield from flat(inner, f"{path}.{name}")


def listed(folder: Path) -> Collection[str]:
    """The names in a folder."""
    try:
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


def newest(folder: Path, most: int) -> list[str]:
    """The artifacts in a stage's folder, the newest first."""
    found = []
    for name in listed(folder):
        try:
            found.append(((folder / name / MANIFEST).stat().st_mtime, name))
        except OSError:
            continue
    return [name for _, name in sorted(found, reverse=True)[:most]]
