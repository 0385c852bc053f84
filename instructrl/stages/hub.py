"""Rows of a Hub data set. Data only: code that comes with a repository never runs (datasets >= 4 has no way to).

With the network off (`HF_HUB_OFFLINE=1`, which `runtime.offline` sets), a set is read from the Hub's cache folder,
`$HF_HOME/hub/datasets--OWNER--NAME/snapshots/COMMIT`, and only at the pinned commit. The cache of `datasets` is not
asked: offline it gives the commit that it prepared last, whichever that is (`CachedDatasetModuleFactory`).
"""

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instructrl.config import Source
from instructrl.errors import UserError
from instructrl.stages.readers import READERS, Row, ending, read_file

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)?$")  # how the Hub names the parts of a large file


def hub_rows(source: Source, key: str) -> Iterator[Row]:
    """All rows, in their order. Raises UserError where the set, its configuration, split or revision is not there."""
    if source.files:
        for name in source.files:
            yield from read_file(_file(source, name, key), key)
        return
    import datasets

    options = {"name": source.name, "split": source.split}
    with _explained(source, key):
        if _offline():
            folder = _snapshot(source, key)
            _whole(folder, key)
            table = datasets.load_dataset(str(folder), streaming=True, **options)
        else:
            options["revision"] = source.revision
            table = datasets.load_dataset(source.path, streaming=source.stream, **options)
        for number, values in enumerate(table, 1):
            yield Row(values, f"{source.path} row {number}")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def _snapshot(source: Source, key: str) -> Path:
    """The set's folder in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
    except HFValidationError as error:
        raise UserError(
            f"{key}.path: {source.path!r} is no file, no folder and no Hub id ({_first_line(error)})"
        ) from None
    except LocalEntryNotFoundError:
        raise _not_here(source, key, "") from None
    return Path(found)


def _file(source: Source, name: str, key: str) -> Path:
    """One file of the set, on this disk."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not ending(Path(name)):
        raise UserError(f"{key}.files: {name!r} is no {', '.join(READERS)} file (each may end in .gz)")
    with _explained(source, key):
        try:
            options = {"repo_type": "dataset", "revision": source.revision, "local_files_only": _offline()}
            return Path(hf_hub_download(source.path, name, **options))
        except LocalEntryNotFoundError:
            raise _not_here(source, key, f"the file {name} of ") from None
        except EntryNotFoundError:
            raise UserError(f"{key}.files: the Hub data set {source.path!r} has no file {name}") from None


def _whole(folder: Path, key: str) -> None:
    """Refuse a set of which only some parts were downloaded: it would be read as a smaller one."""
    there: dict[tuple[str, str, str], int] = {}
    for path in folder.rglob("*"):
        part = SHARD.match(path.relative_to(folder).as_posix())
        if part:
            name = (part[1], part[3], part[4] or "")
            there[name] = there.get(name, 0) + 1
    for (name, parts, suffix), found in sorted(there.items()):
        if found < int(parts):
            raise UserError(
                f"{key}.path: of {name}-*-of-{parts}{suffix} only {found} of {int(parts)} files are in {folder}; "
                "download the others where there is a network"
            )


def _not_here(source: Source, key: str, part: str) -> UserError:
    commit = f" at commit {source.revision}" if source.revision else ""
    return UserError(
        f"{key}.path: {part}the Hub data set {source.path!r}{commit} is not in the cache on this disk, and the network "
        f"is switched off: {_go_on()}"
    )


def _go_on() -> str:
    way = "download it where there is a network and set path to the local file or folder"
    return f"{way}, or set runtime.offline=false" if _offline() else way


@contextmanager
def _explained(source: Source, key: str) -> Iterator[None]:
    """Turn what the libraries raise, while they look a set up or while they read it, into one sentence."""
    import datasets
    import pyarrow
    from huggingface_hub.errors import HfHubHTTPError

    what = f"the Hub data set {source.path!r}"
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{key}.path: {source.path!r} is neither a file or folder here nor a data set on the Hub "
            f"({_first_line(error)}); to use local data, {_go_on()}"
        ) from None
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{key}: {what} cannot be read: {_first_line(error.__cause__ or error)}") from None
    except (ConnectionError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{key}.path: {what} cannot be loaded, there is no network or the Hub does not answer "
            f"({_first_line(error)}); {_go_on()}"
        ) from None
    except (ValueError, RuntimeError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        # An unknown name, split or revision, a script, or a damaged file: the library's own sentence says which.
        raise UserError(f"{key}: {what} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
