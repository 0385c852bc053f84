"""The `key=value` arguments of the command line: read by Hydra's grammar, checked against the schema."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, RangeSweep, Transformer
from hydra.errors import HydraException

from instructrl.errors import UserError
from instructrl.keys import exists, kind_of, section_of, suggestion
from instructrl.recipe_files import Location, RecipeFiles, is_recipe


def sweep_values(override: Override, argument: str) -> list[tuple[str, Any]]:
    """The values of a sweep, as Hydra's --multirun makes them: each spelt for an override, and itself.

    Hydra adds up the steps of range(0.1,0.4,0.1) and so comes to 0.30000000000000004, which would be made as another
    artifact than 0.3, and to 0.4: here twelve digits count, and the end is left out.

    Raises:
        UserError: they cannot be listed: glob() and interval(); or there is none.
    """
    try:
        values = list(override.sweep_iterator())
    except HydraException as error:  # glob() makes sense only for groups
        raise UserError(f"{argument}: {str(error).splitlines()[0]}.") from None
    swept = override.value()
    if isinstance(swept, RangeSweep):
        values = [float(f"{value:.12g}") if isinstance(value, float) else value for value in values]
        values = [value for value in values if value != swept.stop]
    if not values:
        raise UserError(f"{argument}: there is no value in it.")
    return [(Transformer.str(value), value.text if isinstance(value, QuotedString) else value) for value in values]


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
