"""Text of others on a page of Markdown: shown as it is, whatever is in it."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], escaped: bool = False, numbers: int = 0) -> str:
    """A Markdown table. Cells are escaped here unless they are `escaped` already.

    Args:
        numbers: so many columns, the last ones, are numbers: aligned right.
    """
    made = [list(row) if escaped else [cell(text) for text in row] for row in rows]
    head = f"| {' | '.join(columns)} |"
    line = "|" + " --- |" * (len(columns) - numbers) + " ---: |" * numbers
    return "\n".join([head, line, *(f"| {' | '.join(row)} |" for row in made)])


def cell(text: str) -> str:
    """Text that Markdown shows as it is, on one line of a table: no markup, no HTML."""
    safe = re.sub(r"&(?=#?\w+;)", "&amp;", re.sub(r"\s", " ", printable(text)))
    safe = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", safe)  # any other < is text (CommonMark, 6.6)
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", safe)


def code(text: str) -> str:
    """Text for between two backticks."""
    return printable(text).replace("`", "'").replace("\n", " ").replace("|", "/")


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside: nothing in it is markup."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def printable(text: str) -> str:
    """Control, direction and other invisible characters as escapes, so that they cannot change what surrounds them."""
    shown = []
    for letter in text.replace("\r\n", "\n"):
        hidden = unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") and letter not in "\n\t"
        shown.append(f"\\u{ord(letter):04x}" if hidden else letter)
    return "".join(shown)
