"""What the paper says of its own data: Tables 1, 6 and 8 to 11, and App. A.4 (https://arxiv.org/abs/2203.02155).

Lengths are tokens of GPT-3's BPE. SFT, RM and PPO are our `demonstrations`, `rankings` and `prompts`.
"""

from typing import NamedTuple


class Summary(NamedTuple):
    """A row of Tables 9 to 11."""

    count: int
    mean: float
    std: float
    least: float
    quarter: float
    median: float
    three_quarters: float
    most: float


LABELERS, CUSTOMERS = "labelers", "customers"

SIZES = {
    ("demonstrations", "train"): {LABELERS: 11_295, CUSTOMERS: 1_430},
    ("demonstrations", "valid"): {LABELERS: 1_550, CUSTOMERS: 103},
    ("rankings", "train"): {LABELERS: 6_623, CUSTOMERS: 26_584},
    ("rankings", "valid"): {LABELERS: 3_488, CUSTOMERS: 14_399},
    ("prompts", "train"): {CUSTOMERS: 31_144},
    ("prompts", "valid"): {CUSTOMERS: 16_185},
}
"""Table 6: prompts by set and part, and by who wrote them."""

TEST_PARTS = ("eval", "test")
"""Our parts of `prompts` that stand beside the paper's test set, whose writers Table 6 does not give."""

PROMPTS_A_USER = {
    ("demonstrations", "train"): 1.65,
    ("demonstrations", "valid"): 1.87,
    ("rankings", "train"): 5.35,
    ("rankings", "valid"): 27.96,
    ("prompts", "train"): 6.01,
    ("prompts", "valid"): 31.55,
    ("prompts", "test"): 1.81,
}
"""Table 8: average prompts a customer."""

MOST_PROMPTS_A_USER = 200
"""Section 3.2: "limit the number of prompts to 200 per user ID"."""

PROMPT_LENGTHS = {
    ("demonstrations", "train"): Summary(12_725, 408, 433, 1, 37, 283, 632, 2048),
    ("demonstrations", "valid"): Summary(1_653, 401, 433, 4, 41, 234, 631, 2048),
    ("rankings", "train"): Summary(33_207, 199, 334, 1, 20, 64, 203, 2032),
    ("rankings", "valid"): Summary(17_887, 209, 327, 1, 26, 77, 229, 2039),
    ("prompts", "train"): Summary(31_144, 166, 278, 2, 19, 62, 179, 2044),
    ("prompts", "valid"): Summary(16_185, 186, 292, 1, 24, 71, 213, 2039),
    ("prompts", "test"): Summary(3_196, 115, 194, 1, 17, 49, 127, 1836),
}
"""Table 9."""

USE_CASES = {
    "generation": (45.6, Summary(21_684, 130, 223, 1, 20, 52, 130, 1999)),
    "open QA": (12.4, Summary(6_262, 89, 193, 1, 10, 18, 77, 1935)),
    "brainstorming": (11.2, Summary(5_245, 83, 149, 4, 17, 36, 85, 1795)),
    "chat": (8.4, Summary(3_911, 386, 376, 1, 119, 240, 516, 1985)),
    "rewrite": (6.6, Summary(3_168, 183, 237, 4, 52, 99, 213, 1887)),
    "summarization": (4.2, Summary(1_962, 424, 395, 6, 136, 284, 607, 1954)),
    "classification": (3.5, Summary(1_615, 223, 318, 6, 68, 124, 205, 2039)),
    "other": (3.5, Summary(1_767, 180, 286, 1, 20, 72, 188, 1937)),
    "closed QA": (2.6, Summary(1_398, 325, 426, 5, 68, 166, 346, 2032)),
    "extract": (1.9, Summary(971, 304, 373, 3, 74, 149, 390, 1937)),
}
"""A use case's share of the prompts of the RM set in per cent (Table 1), and the lengths of its prompts (Table 10)."""

_ALSO_CALLED = {
    "rewrite": ("rewriting",),
    "summarization": ("summarize", "summarise", "summary", "summarisation"),
    "classification": ("classify",),
    "extract": ("extraction", "information extraction"),
    "generation": ("creative writing", "generate"),
    "brainstorming": ("brainstorm",),
    "open QA": ("qa open",),
    "closed QA": ("qa closed",),
}

WRITTEN_BY = {
    LABELERS: {
        "prompt": Summary(12_845, 437, 441, 5, 42, 324, 673, 2048),
        "response": Summary(12_845, 38, 76, 1, 9, 18, 41, 2048),
    },
    CUSTOMERS: {
        "prompt": Summary(1_533, 153, 232, 1, 19, 67, 186, 1937),
        "response": Summary(1_533, 88, 179, 0, 15, 39, 88, 2048),
    },
}
"""Table 11: prompts and demonstrations of the SFT set, by who wrote the prompt."""

ENGLISH = 96.0
"""App. A.4: per cent of about 110,000 prompts that langid.py takes for English; the authors think 99 or more are."""

OTHER_LANGUAGES = 20
"""App. A.4: so many other languages, at least."""


def use_case(category: str) -> str:
    """The paper's name of a use case, whatever the data set calls it (`open_qa`: open QA); "" for one it lacks."""
    plain = " ".join("".join(letter if letter.isalnum() else " " for letter in category.casefold()).split())
    for name in USE_CASES:
        if plain in (name.casefold(), *_ALSO_CALLED.get(name, ())):
            return name
    return ""
