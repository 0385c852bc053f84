"""`data_card.md`: what the prepared tables hold and how they were made, beside the paper's own Tables 6 to 11."""

from pathlib import Path

from instructrl.stages import card_tables, paper_data, plots
from instructrl.stages.card_tables import SETS, Tallies, most_frequent, paper_lengths, total_by, use_case_shares
from instructrl.stages.flow import KINDS, Flow, flow
from instructrl.stages.tally import Count, count_words, tally

PARTS = ("train", "valid", "judge", "eval", "test")
PAPER_URL = "https://arxiv.org/abs/2203.02155"


def write_card(folder: Path, card: dict, count_tokens: Count | None) -> None:
    """Read the tables that `card["rows"]` names from `folder`, and write data_card.md and its plots there.

    Tables are read in batches; memory does not grow with their rows but for 8 bytes a row (the user's hash). The same
    tables and card give the same bytes.

    Args:
        card: the content of card.json: "rows", and where rows were read, "sources", "steps", "read", "kept", "leakage",
            "phrases".
        count_tokens: texts -> their lengths in tokens; None: lengths are in words, and the card says so.

    Raises:
        ValueError: the counts do not add up, or a table does not have the rows that the card says.
    """
    unit = "words" if count_tokens is None else "tokens"
    tallies = {
        name: tally(folder / f"{name}.parquet", count_tokens or count_words)
        for name in sorted(card["rows"], key=_order)
        if name.partition(".")[0] in KINDS
    }
    for name, found in tallies.items():
        if found.rows != card["rows"][name]:
            raise ValueError(f"{name}: the card says {card['rows'][name]} rows, the table has {found.rows}")
    followed = flow(card)
    prompts = {name: found for name, found in tallies.items() if name.partition(".")[0] in SETS}
    drawn = draw(folder, prompts, followed, unit)
    sections = {
        "Sizes (Table 6)": card_tables.sizes(tallies),
        "Use cases (Table 1)": card_tables.use_cases(prompts),
        "Kinds of prompts (App. A.1)": card_tables.kinds(prompts),
        "Prompts a user (Table 8)": card_tables.users(prompts),
        "Prompt lengths (Table 9)": card_tables.lengths(prompts, unit),
        "Prompt lengths by use case (Table 10)": card_tables.lengths_by_use_case(prompts, unit),
        "Prompts and demonstrations by source (Table 11)": card_tables.lengths_by_source(prompts, unit),
        "Languages (App. A.4)": card_tables.languages(prompts),
        "What was removed": card_tables.removed(followed),
        "Leakage": card_tables.leakage(card.get("leakage"), card.get("phrases") or {}),
        "Sources": card_tables.sources(card.get("sources", {})),
    }
    parts = [INTRODUCTION.format(url=PAPER_URL, unit=UNITS[unit])]
    for title, body in sections.items():
        image = drawn.get(title.partition(" (")[0])
        parts += [f"## {title}", *([f"![{title}]({image})"] if image else []), body]
    (folder / "data_card.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


INTRODUCTION = """# Data card

What the prepared sets hold and what was done to get them. Every table stands beside the paper's own figures
([Ouyang et al. 2022]({url})); its SFT, RM and PPO sets are `demonstrations`, `rankings` and `prompts` here. {unit}
Table 7 (what labelers note of a prompt) has no counterpart: no table here has such notes."""

UNITS = {
    "tokens": "Lengths are in tokens of this recipe's tokenizer, the paper's in tokens of GPT-3's.",
    "words": "Lengths are in **words**, as there is no tokenizer yet; the paper's are in tokens, about 4 for 3 words.",
}


def draw(folder: Path, prompts: Tallies, followed: Flow | None, unit: str) -> dict[str, str]:
    """Draw what there is something to draw of. Returns the file's name by the section's."""
    drawn = {}
    shares = use_case_shares(prompts)
    if shares:
        drawn["Use cases"] = "card_use_cases.png"
        said = {name: share for name, (share, _) in paper_data.USE_CASES.items()}
        names = [name for name in next(iter(shares.values())) if name]
        matched = {name: said[paper_data.use_case(name)] for name in names if paper_data.use_case(name)}
        plots.use_cases(folder / drawn["Use cases"], shares, matched)
    counts = {name: found.prompts_a_user() for name, found in prompts.items() if len(found.users)}
    if counts:
        drawn["Prompts a user"] = "card_users.png"
        plots.users(folder / drawn["Prompts a user"], counts)
    summaries = {name: found.prompts["", ""].summary() for name, found in prompts.items()}
    rows = [(name, name.partition(".")[0], ours, paper_lengths(name)) for name, ours in summaries.items() if ours]
    if rows:
        drawn["Prompt lengths"] = "card_lengths.png"
        plots.lengths(folder / drawn["Prompt lengths"], rows, unit)
    spoken = total_by(prompts, "language")
    spoken.pop("", None)
    if len(spoken) > 1:
        drawn["Languages"] = "card_languages.png"
        plots.languages(folder / drawn["Languages"], dict(most_frequent(spoken)[0]))
    if followed and any(followed.read.values()):
        drawn["What was removed"] = "card_removed.png"
        plots.removed(folder / drawn["What was removed"], followed)
    return drawn


def _order(name: str) -> tuple[int, int, str]:
    """Demonstrations, rankings, prompts, text; of each train first."""
    kind, _, part = name.partition(".")
    place = KINDS.index(kind) if kind in KINDS else len(KINDS)
    return place, PARTS.index(part) if part in PARTS else len(PARTS), name
