"""Which kinds of personal data a text holds: the filter on the training split (paper, 3.2), extra `instructrl[pii]`.

The recognisers are Presidio's (https://microsoft.github.io/presidio/): of the libraries on the package index it is the
one that is well kept (scrubadub's last release is of 2023), and has check digits and national ids of many countries.
They are called one by one, without its engine, whose names and places need a language model to be downloaded. Nothing
is downloaded here. So a name, and most of an address, is known only by what stands beside it: "My name is", "Dear Mr.",
a house number. `docs/data-card.md` shows what that catches and misses.

Presidio's import takes seconds and brings in torch: `personal` does it at its first call, once in a process.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Any

from instructrl.errors import UserError

if TYPE_CHECKING:
    from presidio_analyzer import EntityRecognizer

KINDS = ("address", "bank", "card", "email", "id", "ip", "name", "phone")

THRESHOLD = 0.4
"""Of a match's score. By Presidio's scores that is: check digits are right, the form leaves no doubt, or the form is
plausible and a word before it says what it is."""

CUE_BONUS = 0.35
"""What such a word (of the recogniser's `context`) adds to the score, and with it the score is at least THRESHOLD:
the numbers of Presidio's engine."""

CUE_CHARACTERS = 60
"""How far before a match such a word may stand."""

NATIONAL_IDS = {
    "UsSsnRecognizer": r"\d{3}.?\d{2}.?\d{4}",
    "UsItinRecognizer": r"9\d{2}.?\d{2}.?\d{4}",
    "UsPassportRecognizer": r"\d{8}",
    "UsLicenseRecognizer": r"\d{4}",
    "UkNinoRecognizer": r"\d\d ?\d\d ?\d\d",
    "NhsRecognizer": r"\d{3}.?\d{3}.?\d{4}",
    "EsNifRecognizer": r"\d{7}",
    "EsNieRecognizer": r"[XYZxyz].?\d{7}",
    "ItFiscalCodeRecognizer": r"\w{6}\d\d\w\d\d",
    "InAadhaarRecognizer": r"\d{4}.?\d{4}.?\d{4}",
    "InPanRecognizer": r"[A-Za-z]{5}\d{4}",
    "PlPeselRecognizer": r"\d{11}",
    "FiPersonalIdentityCodeRecognizer": r"\d{6}[-+A-Fa-f]\d{3}",
    "SePersonnummerRecognizer": r"\d{6}[-+]?\d{4}",
    "AuTfnRecognizer": r"\d{3}.?\d{3}.?\d{3}",
    "CaSinRecognizer": r"\d{3}.?\d{3}.?\d{3}",
    "DeTaxIdRecognizer": r"\d{11}",
    "KrRrnRecognizer": r"\d{6}-?\d{7}",
    "SgFinRecognizer": r"[A-Za-z]\d{7}[A-Za-z]",
}
"""Presidio's recognisers of numbers that a state gives a person, and what a text must hold to be worth asking them."""

ONLY_DIGITS = {
    "NhsRecognizer",
    "InAadhaarRecognizer",
    "PlPeselRecognizer",
    "SePersonnummerRecognizer",
    "AuTfnRecognizer",
    "CaSinRecognizer",
    "DeTaxIdRecognizer",
}
"""Their check digit is right for every tenth number that comes along: they need a cue as well."""

_CAPITALIZED = r"[A-ZÀ-ÖØ-Þ][\w'\u2019-]+"
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Terrace|Place|Square|Crescent|Close|Way"
)
ADDRESSES = (
    rf"\b\d{{1,5}}[A-Za-z]? (?:{_CAPITALIZED}\.? ){{1,3}}(?:{_STREETS})\b\.?"
    r"(?=\s*(?:[,;.)\n]|$|Apt|Apartment|Suite|Unit|in [A-Z]|#))",
    r"\b[A-ZÄÖÜ][a-zäöüß-]+(?:straße|strasse|str\.|weg|platz|allee|gasse) \d{1,4}[a-z]?\b",
    r"\b\d{1,4}(?: bis| ter)?,? (?:rue|avenue|boulevard|place|chemin|impasse|quai|allée) "
    r"(?:d[eu]s? |de la |de l')?[A-ZÀ-Þ]",
    r"\b(?:[Cc]alle|[Aa]venida|[Vv]ia|[Pp]iazza|[Rr]ua|ul\.) (?:de |del |la |da ){0,2}"
    rf"{_CAPITALIZED}(?: {_CAPITALIZED})?,? \d{{1,4}}\b",
    r"\bP\.? ?O\.? ?Box \d+",
)
"""A house number and a street, as written in English, German, French, and Spanish, Italian, Portuguese and Polish."""

_FULL_NAME = rf"{_CAPITALIZED}(?: [A-Z]\.)?(?: {_CAPITALIZED}){{1,2}}"
NAMES = (
    rf"\b(?:[Mm]y name is|[Ii]ch heiße|[Mm]ein Name ist|[Mm]e llamo|[Jj]e m['\u2019]appelle|[Mm]i chiamo) {_FULL_NAME}",
    rf"\b(?:Hi|Hello|Hey),? (?:I['\u2019]m|I am|this is) {_FULL_NAME}",
    rf"^(?:Full name|Name|Patient|Customer|Client|Employee): ?{_FULL_NAME}",
    rf"\b(?:[Rr]egards|[Ss]incerely|[Cc]heers|[Tt]hanks|Best|Yours)[,.]?\n+{_FULL_NAME}[ \t]*(?:\n|$)",
    rf"\bDear (?:Mr|Mrs|Ms|Miss|Dr|Prof)\.? {_CAPITALIZED}",
)
"""A name where somebody says that it is one. Names that only stand in a sentence are not seen."""

PHONE_CUES = ("phone", "telephone", "tel", "cell", "mobile", "call", "text", "reach", "fax", "whatsapp", "ring", "sms")
PHONE_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "IN", "BR", "SE", "PL")
"""Whose national form of a number is known; with a country code (+46 ...) every country's is."""


@dataclass(frozen=True)
class Rule:
    """One recogniser, and when its matches count."""

    kind: str
    recogniser: "EntityRecognizer"
    may: re.Pattern
    """What a text must hold for the recogniser to be asked: it is slow, this is not."""
    cues: re.Pattern | None
    needs_cue: bool = False
    counts: Callable[[str], bool | None] = lambda text: None
    """Of the matched text: True, it counts; False, it does not; None, its score decides."""


def check() -> None:
    """Raise UserError where the extra is not installed."""
    if find_spec("presidio_analyzer") is None:
        raise UserError("finding personal data needs an extra: pip install 'instructrl[pii]'")


def personal(text: str) -> list[str]:
    """The kinds of personal data in the text, of KINDS, sorted; [] for none. The same text gives the same kinds."""
    found: set[str] = set()
    for rule in rules():
        if rule.kind not in found and rule.may.search(text) and _holds(rule, text):
            found.add(rule.kind)
    return sorted(found)


def _holds(rule: Rule, text: str) -> bool:
    recogniser = rule.recogniser
    for match in recogniser.analyze(text, recogniser.supported_entities, None):
        before = text[max(0, match.start - CUE_CHARACTERS) : match.start]
        cue = bool(rule.cues and rule.cues.search(before))
        score = max(match.score + CUE_BONUS, THRESHOLD) if cue else match.score
        decided = None if cue else rule.counts(text[match.start : match.end])
        if decided or (decided is None and score >= THRESHOLD and (cue or not rule.needs_cue)):
            return True
    return False


@cache
def rules() -> tuple[Rule, ...]:
    """Every rule, made once.

    Raises:
        UserError: the extra is not installed.
    """
    check()
    import presidio_analyzer.predefined_recognizers as presidio

    found = [
        _rule("email", _email(), r"@\S"),
        _rule("card", presidio.CreditCardRecognizer(), r"(?:\d\W?){12}"),
        _rule("bank", presidio.IbanRecognizer(), r"[A-Za-z]{2}\d\d ?\w"),
        _rule("bank", presidio.UsBankRecognizer(), r"\d{8}"),
        _rule("ip", presidio.IpRecognizer(), r"\d\.\d{1,3}\.\d|:\w*:", counts=_is_of_someone),
    ]
    for name, may in NATIONAL_IDS.items():
        found.append(_rule("id", getattr(presidio, name)(), may, needs_cue=name in ONLY_DIGITS))
    phone = presidio.PhoneRecognizer(supported_regions=PHONE_REGIONS, context=list(PHONE_CUES))
    found.append(_rule("phone", phone, r"(?:\d\W{0,3}){7}", counts=_is_written_as_phone))
    found.append(_rule("address", _patterns("ADDRESS", ADDRESSES), r"\d"))
    found.append(_rule("name", _patterns("NAME", NAMES), r"[A-Z]\w+ [A-Z]|Dear "))
    return tuple(found)


def _rule(kind: str, recogniser: "EntityRecognizer", may: str, **settings: Any) -> Rule:
    words = "|".join(re.escape(word) for word in recogniser.context or ())
    cues = re.compile(rf"\b(?:{words})\b", re.IGNORECASE) if words else None
    return Rule(kind, recogniser, re.compile(may), cues, **settings)


def _patterns(entity: str, expressions: tuple[str, ...]) -> "EntityRecognizer":
    from presidio_analyzer import Pattern, PatternRecognizer

    patterns = [Pattern(f"{entity} {number}", one, THRESHOLD) for number, one in enumerate(expressions)]
    return PatternRecognizer(entity, patterns=patterns, global_regex_flags=re.MULTILINE)  # not IGNORECASE


def _email() -> "EntityRecognizer":
    from presidio_analyzer.predefined_recognizers import EmailRecognizer
    from tldextract import TLDExtract

    suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list that comes with it: nothing is fetched

    class Email(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text.rpartition("@")[2]).suffix)

    return Email()


def _is_of_someone(address: str) -> bool | None:
    """False for what is no address on the Internet, and for 1.2.3.4, which is a version or a section."""
    if re.fullmatch(r"\d(\.\d){3}", address) or not ip_interface(address).ip.is_global:
        return False
    return None


def _is_written_as_phone(number: str) -> bool:
    """A country code, an area code in brackets, or three groups; any other number needs a cue.

    Not the groups of an IP address, of a version (6.2.9200.16384) or of a US social security number (123-45-6789).
    """
    if re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}|\d+\.\d\..*|\d{3}-\d\d-\d{4}", number):
        return False
    return bool(re.match(r"\+|\(\d+\)|00\d", number) or re.search(r"\d[ .-]\d+[ .-]\d", number))
