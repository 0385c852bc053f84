"""Recipes: YAML files and `key=value` overrides, composed by Hydra, checked by pydantic into a `config.Recipe`.

A file that a recipe names by a relative path is looked for in the current directory first, then in the folder of the
YAML file that names it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.keys import closest, did_you_mean
from instructrl.mistakes import explain, explain_number, not_finite
from instructrl.overrides import is_given, parse, spell
from instructrl.recipe_files import Location, RecipeFiles, explain_yaml, recipe_names, shipped, shown
from instructrl.stages.sources import LISTS

DEFAULT_RECIPE = "tiny"
PATHS = ("path", "examples", "classifier")  # keys of sections that may name a file or folder


@dataclass(frozen=True)
class Composition:
    """A checked recipe, and where each of its values was set."""

    recipe: Recipe
    files: RecipeFiles
    given: tuple[str, ...]  # the keys on the command line, dotted

    def where(self, location: Location) -> str:
        """`my.yaml:5: ` for a value that a file sets, "" for one from the command line or the schema."""
        return "" if is_given(location, self.given) else self.files.where(location)

    def where_named(self, message: str) -> str:
        """The same for the key that a message begins with: `data.rankings[0]: there is no column ranks`."""
        key = re.match(r"[a-z_]+(?:\.\w+|\[\d+\])+", message)
        return self.where(re.findall(r"\w+", key[0])) if key else ""


def load_recipe(arguments: list[str]) -> Recipe:
    """`["recipe=tiny", "sft.learning_rate=3e-5"]` -> the checked recipe.

    Raises:
        UserError: a line for each mistake, those in YAML files with file and line.
    """
    return compose_recipe(arguments).recipe


@dataclass(frozen=True)
class Draft:
    """A composed recipe that is not checked yet."""

    values: dict[str, Any]
    files: RecipeFiles
    given: tuple[str, ...]
    problems: tuple[str, ...] = ()  # of its arguments

    def check(self) -> Composition:
        """The recipe; changes the values.

        Raises:
            UserError: a line for each mistake.
        """
        problems, values = list(self.problems), self.values
        resolve_paths(values, self.files, self.given)
        wild = dict(not_finite(values))
        problems += [explain_number(location, number, self.files, self.given) for location, number in wild.items()]
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError as error:
            wrong = [problem for problem in error.errors() if problem["loc"] not in wild]
            problems += [explain(problem, self.files, self.given) for problem in wrong]
        if problems:
            raise UserError("\n".join(problems))
        return Composition(recipe, self.files, self.given)


def compose_recipe(arguments: list[str]) -> Composition:
    """As `load_recipe`, and knows where each value comes from."""
    return draft(arguments).check()


def draft(arguments: list[str]) -> Draft:
    """The recipe as Hydra composes it.

    Raises:
        UserError: it cannot be composed.
    """
    path = find_recipe(recipe_argument(arguments))
    roots = list(dict.fromkeys((path.parent, shipped("recipes"), shipped("conf"))))
    files = RecipeFiles(roots)
    overrides, problems = parse([argument for argument in arguments if not argument.startswith("recipe=")], files)
    files.read(path)
    for group in sorted(files.choices.keys() - files.groups):
        files.extend("", [*group.split("/"), files.choices[group]])
    if files.problems:
        raise UserError("\n".join(problems + files.problems))
    given = tuple(override.key_or_group for override in overrides if override.key_or_group not in files.choices)
    try:
        values = composed(path, files, overrides)
    except UserError as error:
        raise UserError("\n".join([*problems, str(error)])) from None
    if "name" not in given and files.files[0].line(("name",)) is None:
        values["name"] = path.stem
    return Draft(values, files, given, tuple(problems))


def composed(path: Path, files: RecipeFiles, overrides: list[Override]) -> dict[str, Any]:
    """Hydra's composition, all interpolations resolved."""
    search_path = ",".join("'file://{}'".format(str(root).replace("'", r"\'")) for root in files.roots[1:])
    spelt = [f"hydra.searchpath=[{search_path}]", *(spell(override, files) for override in overrides)]
    try:
        with initialize_config_dir(str(path.parent), job_name="instructrl", version_base="1.3"):
            config = compose(path.stem, spelt)
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return values
    except RecursionError:
        raise UserError(f"{shown(path)}: a value refers to itself.") from None
    except yaml.YAMLError as error:
        raise UserError(explain_yaml(error, path)) from None
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException = error
        while cause.__cause__:  # what Hydra wraps says more than Hydra
            cause = cause.__cause__
        lines = [*str(cause).splitlines(), *str(error).splitlines(), type(cause).__name__]
        key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
        where = files.where(key.replace("[", ".").replace("]", "").split(".")) if key else f"{shown(path)}: "
        raise UserError(f"{where}{key}{': ' if key else ''}{lines[0].rstrip('.')}.") from None


# Recipes by name


def recipe_argument(arguments: list[str]) -> str:
    """The value of `recipe=`, else the default."""
    names = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    if len(names) > 1:
        raise UserError(f"recipe= is given {len(names)} times: {', '.join(names)}.")
    return names[0] if names else DEFAULT_RECIPE


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path (has a slash or ends in .yaml)."""
    known = recipe_names()
    if name in known:
        return shipped("recipes") / f"{name}.yaml"
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        close = closest(name, known)
        there = f" There is a file {name}.yaml: recipe={name}.yaml." if Path(f"{name}.yaml").is_file() else ""
        suggested = there or did_you_mean([close] if close else [])
        raise UserError(f"There is no recipe {name!r}.{suggested} Shipped: {', '.join(known)}.")
    path = Path(name).expanduser().resolve()
    if path.is_dir():
        raise UserError(f"recipe={name} is a folder; name a .yaml file in it.")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else known
        close = closest(name if near is known else path.name, near)
        raise UserError(f"There is no file {name}.{did_you_mean([close] if close else [])}")
    if path.suffix != ".yaml":
        raise UserError(f"recipe={name}: the name of a recipe file ends in .yaml.")
    return path


# Checks


def resolve_paths(values: dict[str, Any], files: RecipeFiles, given: tuple[str, ...]) -> None:
    """Local files: the current directory first, then the folder of the YAML file that names them. In place."""
    data, model, evaluation = (values.get(name) or {} for name in ("data", "model", "eval"))
    found: list[tuple[Location, Any]] = [(("model",), model)]
    if isinstance(data, dict):
        lists = {name: data[name] for name in LISTS if isinstance(data.get(name), list)}
        found += [(("data", name, i), source) for name, sources in lists.items() for i, source in enumerate(sources)]
    if isinstance(evaluation, dict):
        found.append((("eval", "labels"), evaluation.get("labels")))
        tasks = evaluation.get("tasks")
        found += [(("eval", "tasks", i), task) for i, task in enumerate(tasks if isinstance(tasks, list) else [])]
    for location, section in found:
        for name in PATHS:
            text = section.get(name) if isinstance(section, dict) else None
            if isinstance(text, str) and text:
                folder = None if is_given((*location, name), given) else files.folder((*location, name))
                section[name] = resolve_path(text, folder)


def resolve_path(text: str, folder: Path | None) -> str:
    """The text, or where the file lies that it names."""
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if path.is_absolute():
        return str(path)
    beside = folder / path if folder else None
    return str(beside) if beside and not path.exists() and beside.exists() else text
