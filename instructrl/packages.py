"""Versions of the packages that are installed."""

from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version


@cache
def packages() -> dict[str, str]:
    """Every installed distribution and its version; takes a quarter of a second, so once a command."""
    return {distribution.name: distribution.version for distribution in distributions()}


@cache
def installed(name: str) -> str:
    """The version of a package; "" where there is none. Milliseconds, so once a command."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
