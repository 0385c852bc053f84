"""The YAML files a recipe is composed of, and the line each of its keys stands on.

Hydra composes the files. This module only reads them before Hydra does, because Hydra's errors name neither the file
nor the line, and because the schema's errors come after composition, when both are forgotten.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from instructrl.keys import closest, did_you_mean, dotted

PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)  # https://hydra.cc/docs/1.3/advanced/overriding_packages/
Location = Sequence[str | int]


@dataclass(frozen=True)
class RecipeFile:
    """One file. `package` is where its keys stand in the recipe: `("model",)` for `conf/model/tiny.yaml`."""

    path: Path
    package: tuple[str, ...]
    root: yaml.MappingNode

    def line(self, location: Location) -> int | None:
        """The line on which the file sets the key; None if it does not."""
        if tuple(location[: len(self.package)]) != self.package:
            return None
        node: yaml.Node | None = self.root
        line = line_of(self.root)
        for part in location[len(self.package) :]:
            if isinstance(node, yaml.MappingNode):
                key, node = next(((key, value) for key, value in node.value if key.value == str(part)), (None, None))
            elif isinstance(node, yaml.SequenceNode) and str(part).isdigit() and int(part) < len(node.value):
                key = node = node.value[int(part)]
            else:
                key = None
            if key is None:
                return None
            line = line_of(key)
        return line


@dataclass
class RecipeFiles:
    """All files of one recipe, the most important first: the recipe itself, then what it extends.

    Args:
        roots: the folders that Hydra searches: the recipe's own, the shipped recipes, the shipped groups.
        choices: group -> option, from the command line (`model=tiny`).
    """

    roots: Sequence[Path]
    choices: dict[str, str] = field(default_factory=dict)
    files: list[RecipeFile] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)  # in a `defaults` list; any other can only be added
    problems: list[str] = field(default_factory=list)

    def read(self, path: Path, package: tuple[str, ...] = (), trail: tuple[Path, ...] = ()) -> None:
        """Read the file and, through its `defaults`, the files it is built on; note what is wrong with any of them."""
        text = self.text(path)
        root = self.compose(path, text) if text is not None else None
        if root is None:
            return
        header = PACKAGE.search(text) if text else None
        if header:
            package = tuple(part for part in header[1].split(".") if part != "_global_")
        self.files.append(RecipeFile(path, package, root))
        entries = list(self.defaults(path, root))
        for _, group, option in entries:
            if group.startswith("override "):
                self.choices.setdefault(group.removeprefix("override ").strip("/ "), option)
        for line, entry, option in reversed(entries):
            group = entry.removeprefix("optional ").strip("/ ").split("@")[0]
            if group.startswith("override "):
                continue
            if group:
                self.groups.add(group)
                option = self.choices.get(group, option)
            parts = [part for part in (*group.split("/"), *option.split("/")) if part]
            self.extend(f"{shown(path)}:{line}: ", parts, (*trail, path), optional=entry.startswith("optional "))

    def extend(self, where: str, parts: list[str], trail: tuple[Path, ...] = (), optional: bool = False) -> None:
        """Read `a/b.yaml` for the parts `["a", "b"]`, from the first root that has it."""
        found = self.find("/".join(parts))
        if found in trail:
            through = f" through {' and '.join(shown(path) for path in trail[1:])}" if len(trail) > 1 else ""
            hint = "" if through else f": it hides a shipped recipe {parts[-1]!r}; give the file another name"
            self.problems.append(f"{where}{shown(trail[0])} extends itself{through}{hint}.")
        elif found:
            self.read(found, tuple(parts[:-1]), trail)
        elif not optional:
            *group, option = parts
            known = self.options("/".join(group))
            close = closest(option, known)
            what = f"option {option!r} for {'/'.join(group)}" if group else f"recipe {option!r} to extend"
            self.problems.append(
                f"{where}there is no {what}.{did_you_mean([close] if close else [])} "
                f"There is {', '.join(known) if known else 'none'}."
            )

    def find(self, name: str) -> Path | None:
        """`model/tiny` -> the first `model/tiny.yaml` under the roots."""
        name = name if name.endswith(".yaml") else f"{name}.yaml"
        return next((root / name for root in self.roots if (root / name).is_file()), None)

    def is_group(self, name: str) -> bool:
        """Whether a root has a folder of that name, so that Hydra takes `name=x` for the choice of `name/x.yaml`."""
        return any((root / name).is_dir() for root in self.roots)

    def options(self, group: str) -> list[str]:
        """What a group, or with "" a recipe, can be."""
        folders = [root / group for root in self.roots] if group else self.roots[1:]
        return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})

    def text(self, path: Path) -> str | None:
        """The file's text; None, and a problem, if it cannot be read."""
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            self.problems.append(f"{shown(path)} cannot be read: {(error.strerror or str(error)).lower()}.")
        except UnicodeDecodeError:
            self.problems.append(f"{shown(path)} is not UTF-8 text.")
        return None

    def compose(self, path: Path, text: str) -> yaml.MappingNode | None:
        """The file's YAML tree; None, and a problem, if it is no mapping."""
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            self.problems.append(explain_yaml(error, path))
            return None
        if root is None:
            self.problems.append(f"{shown(path)} is empty: it needs at least one key, such as 'seed: 0'.")
            return None
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "text"
            self.problems.append(f"{shown(path)}:{line_of(root)}: a recipe is 'key: value' lines, this is {kind}.")
            return None
        for key, _ in root.value:
            if key.value == "hydra":  # Hydra would take it for its own, and leave it out
                self.problems.append(f"{shown(path)}:{line_of(key)}: there is no key 'hydra'.")
        for location, first, again in repeated(root):
            self.problems.append(f"{shown(path)}:{again}: {dotted(location)} is set twice, first on line {first}.")
        return root

    def defaults(self, path: Path, root: yaml.MappingNode) -> Iterator[tuple[int, str, str]]:
        """The entries of the `defaults` list: (line, group, option); group is "" for a recipe that is extended."""
        listed = next((value for key, value in root.value if key.value == "defaults"), None)
        if listed is None:
            return
        line = line_of(listed)
        if not isinstance(listed, yaml.SequenceNode):
            self.problems.append(f"{shown(path)}:{line}: defaults must be a list, such as [tiny, _self_].")
            return
        for entry in listed.value:
            line = line_of(entry)
            if isinstance(entry, yaml.ScalarNode):
                if entry.value != "_self_":
                    yield line, "", entry.value
            elif isinstance(entry, yaml.MappingNode) and len(entry.value) == 1:
                [(group, option)] = entry.value
                if isinstance(option, yaml.ScalarNode) and option.value not in ("null", "~", ""):
                    yield line, group.value, option.value
            else:
                self.problems.append(f"{shown(path)}:{line}: an entry of defaults is a name or 'group: option'.")

    def where(self, location: Location) -> str:
        """`my.yaml:5: `, the place that decides the key's value; "" if no file sets it."""
        for file in self.files:
            line = file.line(location)
            if line is not None:
                return f"{shown(file.path)}:{line}: "
        return ""

    def folder(self, location: Location) -> Path | None:
        """The folder of the file that decides the key's value."""
        return next((file.path.parent for file in self.files if file.line(location) is not None), None)


def line_of(node: yaml.Node) -> int:
    """The line the node begins on, counted from 1."""
    return node.start_mark.line + 1 if node.start_mark else 1


def repeated(node: yaml.Node, location: tuple[str | int, ...] = (), seen: Mapping[int, yaml.Node] | None = None):
    """Every key that a mapping has twice, as (location, first line, second line)."""
    seen = {**(seen or {}), id(node): node}  # an alias may point to what it stands in
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = line_of(key)
            if not isinstance(key.value, str):
                continue
            if key.value in lines:
                yield (*location, key.value), lines[key.value], line
            lines.setdefault(key.value, line)
            if id(value) not in seen:
                yield from repeated(value, (*location, key.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            if id(value) not in seen:
                yield from repeated(value, (*location, index), seen)


def explain_yaml(error: yaml.YAMLError, path: Path) -> str:
    """A YAML error in one sentence with its file and line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem = "a line begins with a tab; YAML indents with spaces"
    return f"{shown(path)}:{mark.line + 1 if mark else 1}: this is not valid YAML: {problem}."


def shown(path: Path | None) -> str:
    """The path as a person would type it: relative where that is shorter."""
    relative = os.path.relpath(str(path))
    return min(relative, str(path), key=len)


def shipped(folder: str) -> Path:
    """`conf` or `recipes`: inside the package in a wheel, at the repository's root in an editable install."""
    package = Path(__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def recipe_names() -> list[str]:
    """The shipped recipes: `tiny`, and after them those in folders, `ablations/beta`."""
    root = shipped("recipes")
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(names, key=lambda name: (name.count("/"), name))


def is_recipe(name: str) -> bool:
    """Whether the text would do after `recipe=`."""
    return name in recipe_names() or name.endswith((".yaml", ".yml"))
