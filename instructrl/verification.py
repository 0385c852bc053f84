"""Re-hashes an artifact's files against its manifest, which the plan does not: it trusts sizes and times of change."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from instructrl.artifacts import MANIFEST, NOT_CONTENT, Artifact, read_json
from instructrl.errors import UserError
from instructrl.find import Place
from instructrl.inventory import amount
from instructrl.key import file_sha256


@dataclass(frozen=True)
class Verdict:
    """What became of an artifact's files since it was published."""

    files: int
    size: int  # bytes
    changed: tuple[str, ...]  # a sentence for each file that others read and that is not as it was
    noted: tuple[str, ...]  # the same of files that nothing reads, and of those that were added


def verify(folder: Path) -> Verdict:
    """Read every file of the artifact.

    Raises:
        FileNotFoundError: the folder has no manifest, so it is no artifact.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(manifest)
    try:
        Artifact.read(folder)
        outputs = read_json(manifest)["outputs"]
        wanted = {name: (output["size"], output["sha256"]) for name, output in outputs.items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return Verdict(0, 0, (f"{MANIFEST}: not as it was written",), ())
    changed, noted = [], []
    for name, (size, sha) in wanted.items():
        problem = difference(folder / name, size, sha)
        if problem:
            found, told = (noted, " (no stage reads it)") if name in NOT_CONTENT else (changed, "")
            found.append(f"{name}: {problem}{told}")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    noted += [f"{name}: not in the manifest" for name in sorted(names - wanted.keys() - {MANIFEST})]
    return Verdict(len(wanted), sum(size for size, _ in wanted.values()), tuple(changed), tuple(noted))


def difference(path: Path, size: int, sha: str) -> str:
    """How the file is not as it was, or ""."""
    try:
        now = path.stat().st_size
        if now != size:
            return f"{now:,} bytes in place of {size:,}"
        return "" if file_sha256(path) == sha else "its content changed"
    except FileNotFoundError:
        return "gone"
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"


def show(found: Iterable[Place], named: bool) -> bool:
    """Verify each and print a line for it, and one for each file that is not as it was. Returns whether all are good.

    Args:
        named: whether it was asked for by name: then it is an error if there is none.

    Raises:
        UserError: there is nothing to verify.
    """
    bad, count, size = [], 0, 0
    for place in found:
        try:
            verdict = verify(place.path)
        except FileNotFoundError:
            if named:
                raise UserError(f"{place.stage} is not made: {place.path} has no {MANIFEST}.") from None
            continue
        count, size = count + 1, size + verdict.size
        line = f"{'bad ' if verdict.changed else 'good'}  {place.stage:<12}  {place.path.name}"
        print(f"{line}  {verdict.files} files, {amount(verdict.size)}", flush=True)
        for sentence in (*verdict.changed, *verdict.noted):
            print(f"      {sentence}")
        if verdict.changed:
            bad.append(place)
    if not count:
        raise UserError("Nothing of this recipe has been made yet, so there is nothing to verify.")
    for place in bad:
        print(f"To make {place.stage} again, delete {place.path} and run the same recipe.")
    return not bad
