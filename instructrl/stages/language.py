"""The language of a text, extra `instructrl[lang]`.

By py3langid (https://github.com/adbar/py3langid), the maintained fork of langid.py, which the paper used (App. A.4).
Its model comes with the package, as arrays of numpy: nothing is downloaded or unpickled. Loaded it takes about 100 MB
and a second or two, once in a process. lingua was measured on the same texts: in its accurate mode it makes 1 error
with 1 GB, in its fast mode 13. `docs/data-card.md` has the numbers.
"""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from instructrl.errors import UserError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

CONFIDENCE = 0.4
"""Of the best language's probability; below, the text is too short to tell. Our choice: on the labelled texts, what is
right has .46 or more, and what is no language (sums, code, "ok") .1 or less."""

CHARACTERS = 4000
"""So much of a text's beginning is read."""

NO_LANGUAGE = "zxx"
"""ISO 639-2 for "no linguistic content", which the model knows as if it were a language."""


def check() -> None:
    """Raise UserError where the extra is not installed."""
    if find_spec("py3langid") is None:
        raise UserError("detecting languages needs an extra: pip install 'instructrl[lang]'")


def detect(text: str) -> str:
    """The ISO 639-1 code (`en`), or "" where the text is too short to tell, or is a sum or code without words."""
    code, confidence = identifier().classify(text[:CHARACTERS])
    return code if confidence >= CONFIDENCE and code != NO_LANGUAGE else ""


@cache
def identifier() -> "LanguageIdentifier":
    """py3langid's model, of the languages that have a two-letter code, with probabilities.

    Raises:
        UserError: the extra is not installed.
    """
    check()
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found.set_languages([code for code in found.labels if len(code) == 2 or code == NO_LANGUAGE])
    return found
