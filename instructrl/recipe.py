"""Recipes: YAML files and `key=value` overrides, composed by Hydra, checked by pydantic into a `config.Recipe`.

A file that a recipe names by a relative path is looked for in the current directory first, then in the folder of the
YAML file that names it.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.keys import closest, did_you_mean, dotted, exists, kind_of, section_of, suggestion
from instructrl.recipe_files import Location, RecipeFiles, explain_yaml, shown

DEFAULT_RECIPE = "tiny"
SOURCES = ("demonstrations", "rankings", "prompts", "text")


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


def compose_recipe(arguments: list[str]) -> Composition:
    """As `load_recipe`, and knows where each value comes from."""
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
    resolve_paths(values, files, given)
    wild = dict(not_finite(values))
    problems += [explain_number(location, number, files, given) for location, number in wild.items()]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [explain(problem, files, given) for problem in error.errors() if problem["loc"] not in wild]
    if problems:
        raise UserError("\n".join(problems))
    return Composition(recipe, files, given)


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


# The command line


def sweep(arguments: list[str]) -> list[list[str]]:
    """`ppo.kl_coef=0.01,0.02` -> one list of arguments per combination, as Hydra's --multirun does.

    Raises:
        UserError: an argument cannot be read.
    """
    return [list(combination) for combination in itertools.product(*(list(choices(a)) for a in arguments))]


def choices(argument: str) -> Iterator[str]:
    """The values of one argument of a sweep."""
    if argument.startswith("recipe="):
        yield from (f"recipe={name}" for name in argument.removeprefix("recipe=").split(","))
        return
    override = parse_override(argument)
    if not override.is_sweep_override():
        yield argument
        return
    try:
        values = list(override.sweep_string_iterator())
    except HydraException as error:  # glob() makes sense only for groups
        raise UserError(f"{argument}: {str(error).splitlines()[0]}.") from None
    yield from (f"{override.key_or_group}={value}" for value in values)


def recipe_argument(arguments: list[str]) -> str:
    """The value of `recipe=`, else the default."""
    names = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    if len(names) > 1:
        raise UserError(f"recipe= is given {len(names)} times: {', '.join(names)}.")
    return names[0] if names else DEFAULT_RECIPE


def parse(arguments: list[str], files: RecipeFiles) -> tuple[list[Override], list[str]]:
    """The overrides, and a sentence for each that cannot be one. Choices of groups are noted in `files`."""
    overrides, problems = [], []
    for argument in arguments:
        try:
            override = parse_override(argument)
            check_override(override, argument, files)
        except UserError as error:
            problems.append(str(error))
        else:
            overrides.append(override)
    return overrides, problems


def parse_override(argument: str) -> Override:
    """One `key=value`."""
    try:
        [override] = OverridesParser.create().parse_overrides([argument])
        override.value()
    except (HydraException, ValueError):
        key, equals, value = argument.partition("=")
        if not equals:
            hint = f"; a recipe is chosen with recipe={argument}" if is_recipe(argument) else ""
            raise UserError(f"{argument!r}: an override is written key=value{hint}.") from None
        if not exists(key.lstrip("+~")):
            raise UserError(f"There is no key {key!r}.{suggestion(key.replace('-', '_'))}") from None
        if kind_of(key.split(".")) in (str, str | None) and "'" not in value:
            return parse_override(f"{key}='{value}'")  # a path such as ~/model, or a text with a brace
        raise UserError(f"{argument}: the value cannot be read; put it in quotes: \"{key}='{value}'\".") from None
    return override


def check_override(override: Override, argument: str, files: RecipeFiles) -> None:
    """Refuse what the closed schema cannot take, before Hydra does so in its own words."""
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise UserError(f"{argument}: a comma makes a sweep; add --multirun, or quote the value.")
    if override.type is not None and override.type.name != "CHANGE":
        raise UserError(f"{argument}: every key already has a value; write {key.lstrip('+~')}=...")
    if not isinstance(value, dict) and section_of(kind_of([key])) and files.is_group(key):
        files.choices[key] = argument.partition("=")[2]  # a config group: model=tiny is conf/model/tiny.yaml
    elif not exists(key):
        raise UserError(f"There is no key {key!r}.{suggestion(key)}")


def spell(override: Override, files: RecipeFiles) -> str:
    """Hydra's spelling: the schema, not the YAML, decides which keys and groups exist."""
    if override.key_or_group in files.choices and not isinstance(override.value(), dict):
        return f"{'' if override.key_or_group in files.groups else '+'}{override.input_line}"
    return f"++{override.input_line}"


def is_given(location: Location, given: tuple[str, ...]) -> bool:
    """Whether the command line sets the key, or a section it lies in."""
    key = ".".join(str(part) for part in location)
    return any(key == name or key.startswith(f"{name}.") for name in given)


# Recipes by name


def shipped(folder: str) -> Path:
    """`conf` or `recipes`: inside the package in a wheel, at the repository's root in an editable install."""
    package = Path(__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def is_recipe(name: str) -> bool:
    """Whether the text would do after `recipe=`."""
    return name in recipe_names() or name.endswith((".yaml", ".yml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path (has a slash or ends in .yaml)."""
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        path = shipped("recipes") / f"{name}.yaml"
        if not path.is_file():
            known = recipe_names()
            close = closest(name, known)
            there = f" There is a file {name}.yaml: recipe={name}.yaml." if Path(f"{name}.yaml").is_file() else ""
            suggested = there or did_you_mean([close] if close else [])
            raise UserError(f"There is no recipe {name!r}.{suggested} Shipped: {', '.join(known)}.")
        return path
    path = Path(name).expanduser().resolve()
    if path.is_dir():
        raise UserError(f"recipe={name} is a folder; name a .yaml file in it.")
    if not path.is_file():
        close = closest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else None
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
        lists = {name: data[name] for name in SOURCES if isinstance(data.get(name), list)}
        found += [(("data", name, i), source) for name, sources in lists.items() for i, source in enumerate(sources)]
    if isinstance(evaluation, dict):
        found.append((("eval", "labels"), evaluation.get("labels")))
    for location, section in found:
        text = section.get("path") if isinstance(section, dict) else None
        if isinstance(text, str) and text:
            folder = None if is_given((*location, "path"), given) else files.folder((*location, "path"))
            section["path"] = resolve_path(text, folder)


def resolve_path(text: str, folder: Path | None) -> str:
    """The text, or where the file lies that it names."""
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if path.is_absolute():
        return str(path)
    beside = folder / path if folder else None
    return str(beside) if beside and not path.exists() and beside.exists() else text


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
