"""`instructrl data --show N`: examples on the terminal, with what is trained on in colour, and readable without it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructrl.config import Recipe
from instructrl.display import printable
from instructrl.launch import preview

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

OPEN, CLOSE, NEWLINE, EDGE = "\u27e6", "\u27e7", "\u23ce", "\u00b7"
STYLES = {"context": "dim", "trained on": "green"}
RANK, SPECIAL, HEAD, WARNING = "cyan", "bold magenta", "bold", "yellow"
LEGEND = (
    "Context is read and not trained on. "
    f"{OPEN}...{CLOSE} is a special token, {NEWLINE} the end of a line, {EDGE} a space at the edge of one."
)
GUTTER = len("trained on")


def show_examples(recipe: Recipe, data: Path, count: int) -> None:
    """Print up to `count` examples of each training set in the folder of a data artifact.

    Raises:
        UserError: the recipe's tokenizer cannot be loaded, or does not fit the recipe.
    """
    from rich.console import Console

    found, said = preview(recipe, data, count)
    console = Console(highlight=False)
    for line in [*said, contract_line(found["contract"]), LEGEND]:
        write(console, line)
    for one in found["sets"]:
        show_set(console, one)


def contract_line(contract: dict[str, Any]) -> str:
    """The text contract in a sentence."""
    tokens = ", ".join(f"{name.upper()} {contract[name] or 'none'}" for name in ("bos", "eos", "pad"))
    long = {"drop": "dropped", "left": "cut at the left", "right": "cut at the right"}[contract["truncation"]]
    return (
        f"Text contract {contract['fingerprint']}: template {contract['template']!r}, {tokens}; prompts that are too "
        f"long are {long}."
    )


def show_set(console: "Console", one: dict[str, Any]) -> None:
    """A heading, and the examples."""
    write(console, "")
    write(console, f"{one['name']}: {one['rows']:,} rows" if one["rows"] else f"{one['name']}: {one['says']}", HEAD)
    for example in one["examples"]:
        noted = ", ".join(f"{name} {printable(value)}" for name, value in example["notes"].items())
        write(console, "")
        write(console, f"row {example['row']:,}{': ' if noted else ''}{noted}", HEAD)
        for line in example["says"]:
            write(console, line, WARNING if line.startswith(("dropped", "cut", "the prompt's")) else "")
        for part in example["parts"]:
            for line in part_lines(part["label"], part["pieces"], console.width if console.is_terminal else None):
                console.print(line, soft_wrap=True)


def write(console: "Console", text: str, style: str = "") -> None:
    """A line, in words on a terminal and whole elsewhere; what looks like markup in it is text."""
    from rich.text import Text

    console.print(Text(printable(text), style), soft_wrap=not console.is_terminal)


def part_lines(label: str, pieces: Sequence[tuple[str, bool]], width: int | None) -> "Iterator[Text]":
    """The lines of a part, each behind the part's label: nothing in a text can look like the beginning of another.

    Args:
        label: context, trained on, or a rank.
        pieces: texts, and whether each is a special token.
        width: columns of the terminal; None: lines are not broken.
    """
    from rich.text import Text

    style = STYLES.get(label, RANK)
    text = Text()
    for piece, special in pieces:
        text.append(f"{OPEN}{printable(piece)}{CLOSE}" if special else visible(piece), SPECIAL if special else style)
    for line in text.split("\n"):
        for row in broken(edges(line), width and max(width - GUTTER - 3, 20)):
            yield Text.assemble((f"{label:>{GUTTER}} | ", style), row)


def visible(text: str) -> str:
    """Text in which tabs, ends of lines and our own marks can be seen, and control characters are escapes."""
    marked = printable(text.replace("\r\n", "\\r\n")).replace("\t", "\\t")
    for mark in (OPEN, CLOSE, NEWLINE):
        marked = marked.replace(mark, f"\\u{ord(mark):04x}")
    return marked.replace("\n", f"{NEWLINE}\n")


def edges(line: "Text") -> "Text":
    """The line with the spaces at its ends as dots."""
    from rich.text import Text

    bare = line.plain.removesuffix(NEWLINE)
    left, right = len(bare) - len(bare.lstrip(" ")), len(bare.rstrip(" "))
    dotted = EDGE * left + bare[left:right] + EDGE * (len(bare) - max(left, right)) + line.plain[len(bare) :]
    return Text(dotted, spans=line.spans)


def broken(line: "Text", width: int | None) -> "Iterator[Text]":
    """The line in rows of at most `width` cells."""
    from rich.cells import cell_len

    if width is None or line.cell_len <= width:
        yield line
        return
    ends, used = [], 0
    for position, letter in enumerate(line.plain):
        used += cell_len(letter)
        if used > width:
            ends.append(position)
            used = cell_len(letter)
    yield from line.divide(ends)
