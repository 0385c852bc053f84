"""The tables of the data card as Markdown: each section's counts, beside the paper's."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from instructrl.stages import paper_data
from instructrl.stages.flow import KINDS, Flow
from instructrl.stages.markup import cell, code, grid
from instructrl.stages.paper_data import Summary
from instructrl.stages.tally import Lengths, Tally

SETS = {"demonstrations": "SFT", "rankings": "RM", "prompts": "PPO"}
"""Our sets of prompts, and what the paper calls them."""

MOST_ROWS = 20  # of a column's values in one table of the card
MOST_FILES = 5  # of a source
SUMMARY = ["rows", "mean", "std", "min", "25 %", "50 %", "75 %", "max"]

Tallies = dict[str, Tally]
"""By table (`demonstrations.train`), in the order in which the card lists them."""


def sizes(tallies: Tallies) -> str:
    """Table 6: rows of each set and part, and of each of its sources."""
    rows = []
    for name, found in tallies.items():
        kind, _, part = name.partition(".")
        said = paper_data.SIZES.get((kind, part), {})
        whole = paper_lengths(name)
        paper = " + ".join(f"{count:,} {who}" for who, count in said.items())
        paper = f"{sum(said.values()):,}: {paper}" if len(said) > 1 else paper or (f"{whole.count:,}" if whole else "-")
        rows.append([f"**{cell(name)}**", "all", f"**{found.rows:,}**", paper])
        by = "kind" if kind == "text" else "source"
        named, others = most_frequent(found.names[by])
        rows += [["", cell(source or "(unknown)"), f"{count:,}", ""] for source, count in named]
        rows += _rest(others, 1, 1)
    notes = [_ranked(name, found) for name, found in tallies.items() if found.ranked]
    empty = [f"`{name}`" for name, found in tallies.items() if not found.rows]
    if empty:
        notes.append(f"Empty: {', '.join(empty)}.")
    return _joined(grid(["table", "source", "rows", "paper"], rows, escaped=True, numbers=2), *notes)


def _ranked(name: str, found: Tally) -> str:
    ranked = found.ranked
    rows, pairs = sum(ranked.values()), sum(k * (k - 1) // 2 * often for k, often in ranked.items())
    low, high = min(ranked), max(ranked)
    span = f"{low}" if low == high else f"{low} to {high}"
    return f"`{name}`: {span} responses a prompt (paper: 4 to 9), {pairs:,} pairs, {pairs / rows:.1f} a prompt."


def use_cases(prompts: Tallies) -> str:
    """Table 1: the share of each use case in each set, the paper's last."""
    shares = use_case_shares(prompts)
    if not shares:
        return _missing("use case", "category")
    counted = {kind: total_by(_of(prompts, kind), "category") for kind in shares}
    names, others = most_frequent(sum(counted.values(), Counter()), without="")
    rows = []
    for name, _ in names:
        ours = [f"{counted[kind][name]:,} ({_share(shares[kind].get(name, 0.0))})" for kind in shares]
        paper = paper_data.use_case(name)
        rows.append([cell(name), *ours, _share(paper_data.USE_CASES[paper][0]) if paper else "-"])
    rows += _rest(others, 0, len(shares))
    there = {paper_data.use_case(name) for name, _ in names}
    for name, (share, _) in paper_data.USE_CASES.items():
        if name not in there:
            rows.append([name, *["-"] * len(shares), _share(share)])
    unknown = [f"{counted[kind]['']:,} {kind}" for kind in shares if counted[kind][""]]
    note = f"Rows whose use case is not known: {', '.join(unknown)}." if unknown else ""
    return _joined(grid(["use case", *shares, "paper, RM set"], rows, escaped=True, numbers=len(shares) + 1), note)


def kinds(prompts: Tallies) -> str:
    """App. A.1: plain, few-shot and user-based prompts."""
    counted = {kind: total_by(_of(prompts, kind), "kind") for kind in SETS}
    counted = {kind: found for kind, found in counted.items() if found}
    total = sum(counted.values(), Counter())
    if not total or set(total) == {""}:
        return _missing("kind", "kind")
    names, others = most_frequent(total)
    rows = [[cell(name or "(unknown)"), *(f"{found[name]:,}" for found in counted.values())] for name, _ in names]
    return grid(["kind", *counted], rows + _rest(others, 0, len(counted), after=0), escaped=True, numbers=len(counted))


def users(prompts: Tallies) -> str:
    """Table 8: prompts a user."""
    rows = []
    for name, found in prompts.items():
        counts = found.prompts_a_user()
        paper = paper_data.PROMPTS_A_USER.get(_paper_table(name))
        shown = f"{paper:.2f}" if paper else "-"
        unknown = f"{found.rows - len(found.users):,}"
        if not len(counts):
            rows.append([cell(name), "0", "-", "-", "-", unknown, shown])
            continue
        mean, median, most = len(found.users) / len(counts), float(np.median(counts)), int(counts.max())
        rows.append([cell(name), f"{len(counts):,}", f"{mean:.2f}", _number(median), f"{most:,}", unknown, shown])
    if not any(len(found.users) for found in prompts.values()):
        return _missing("user", "user") + " Without users, splits go by prompt and no prompts a user are capped."
    columns = ["table", "users", "mean", "median", "max", "rows of unknown user", "paper's mean"]
    return _joined(
        grid(columns, rows, escaped=True, numbers=6),
        f"The paper keeps at most {paper_data.MOST_PROMPTS_A_USER} prompts of a user (section 3.2).",
    )


def lengths(prompts: Tallies, unit: str) -> str:
    """Table 9: prompt lengths by set and part."""
    rows = []
    for name, found in prompts.items():
        rows += _compared(cell(name), found.prompts["", ""], paper_lengths(name))
    return grid([f"{unit} a prompt", "", *SUMMARY], rows, escaped=True, numbers=len(SUMMARY))


def lengths_by_use_case(prompts: Tallies, unit: str) -> str:
    """Table 10: prompt lengths by use case, over all sets."""
    merged = _merged(prompts.values(), "category")
    known = Counter({name: found.total() for name, found in merged.items() if name})
    if not known:
        return _missing("use case", "category")
    named, others = most_frequent(known)
    rows = []
    for name, _ in named:
        paper = paper_data.use_case(name)
        rows += _compared(cell(name), merged[name], paper_data.USE_CASES[paper][1] if paper else None)
    table = grid([f"{unit} a prompt", "", *SUMMARY], rows, escaped=True, numbers=len(SUMMARY))
    return _joined(
        table,
        "Over all sets and parts: a prompt in two sets counts twice.",
        f"{len(others):,} more use cases are not shown." if others else "",
    )


def lengths_by_source(prompts: Tallies, unit: str) -> str:
    """Table 11: lengths of the demonstrations' prompts and responses by source and kind, train and valid together."""
    shown = list(_of(prompts, "demonstrations").values())
    if not any(found.rows for found in shown):
        return "There are no demonstrations."
    rows = []
    for column in ("source", "kind"):
        asked, answered = _merged(shown, column), _merged(shown, column, "responses")
        named, _ = most_frequent(Counter({name: found.total() for name, found in asked.items()}))
        if column == "kind" and set(asked) == {""}:
            continue
        for name, _ in named:
            for measured, of in (("prompt", asked), ("demonstration", answered)):
                rows.append([column, cell(name or "(unknown)"), measured, *_row(of[name].summary())])
    for who, measured in paper_data.WRITTEN_BY.items():
        for what, summary in measured.items():
            rows.append(["*paper*", f"*{who}*", "prompt" if what == "prompt" else "demonstration", *_row(summary)])
    return grid([unit, "of", "", *SUMMARY], rows, escaped=True, numbers=len(SUMMARY))


def languages(prompts: Tallies) -> str:
    """App. A.4: prompts by language."""
    spoken = total_by(prompts, "language")
    unknown = spoken.pop("", 0)
    if not spoken:
        return _missing("language", "language") + " The language filter (`instructrl[lang]`) detects it, too."
    total = spoken.total()
    named, others = most_frequent(spoken)
    rows = [
        [cell(name), f"{count:,}", _share(100 * count / total), f"about {paper_data.ENGLISH:g} %" * (name == "en")]
        for name, count in named
    ]
    return _joined(
        grid(["language", "prompts", "share", "paper"], rows + _rest(others, 0, 1, after=2), escaped=True, numbers=3),
        f"{len(spoken):,} languages (paper: English and at least {paper_data.OTHER_LANGUAGES} others). Over all sets "
        "and parts: a prompt in two sets counts twice.",
        f"Rows whose language is not known: {unknown:,}." if unknown else "",
    )


def removed(followed: Flow | None) -> str:
    """Rows read, what each step removed, rows kept."""
    if followed is None:
        return "No rows were read, and none removed: these sets were made, not read from sources."
    kinds = [kind for kind in KINDS if followed.read[kind] or followed.kept[kind]] or list(KINDS)
    rows = [["**read**", "", *(f"**{followed.read[kind]:,}**" for kind in kinds)]]
    for change in followed.changes:
        asked = f"`{code(change.key)}: {code(str(change.setting))}`" if change.key else ""
        rows.append([cell(change.says), asked, *(_signed(change.rows.get(kind, 0)) for kind in kinds)])
    rows.append(["**kept**", "", *(f"**{followed.kept[kind]:,}**" for kind in kinds)])
    return _joined(
        grid(["rows", "key", *kinds], rows, escaped=True, numbers=len(kinds)),
        "The counts add up: in every column, the rows read less those removed are the rows kept, and those are the "
        "rows of the tables above.",
    )


def leakage(found: list[dict] | None, phrases: Mapping) -> str:
    """Training rows that overlap with what measures, and what they share with it that does not count."""
    if found is None:
        return "Overlap with held-out prompts was not looked for (`data.leakage`)."
    if not found:
        return "There was nothing held out to look for overlap with."
    rows = [[cell(one["against"]), f"{one['exact']:,}", f"{one['ngram']:,}"] for one in found]
    examples = [f"- {cell(one['against'])}: {cell(text)}" for one in found for text in one.get("examples", ())]
    length = phrases.get("length", 13)
    columns = ["training rows that overlap with", "same text", f"{length} words in common"]
    said = [f"- {one['rows']:,} rows: {cell(one['words'])}" for one in phrases.get("most", ())]
    phrase = (
        f"{phrases.get('rows', 0):,} more training rows share {length} words with held-out texts that many rows have: "
        "phrases of the format, which stay. If one is none, take its rows out of your files. The most frequent:\n\n"
    )
    return _joined(
        grid(columns, rows, escaped=True, numbers=2),
        "Found there and in training:\n\n" + "\n".join(examples) if examples else "",
        phrase + "\n".join(said) if said else "",
    )


def sources(listed: Mapping[str, dict]) -> str:
    """Where the rows come from: files, revisions, licences, counts."""
    if not listed:
        return "None: the built-in world made these sets."
    rows, notes = [], []
    for key, reading in listed.items():
        source, files = dict(reading["source"]), reading.get("files", [])
        path, revision = source.pop("path", ""), source.pop("revision", None)
        licence = source.pop("licence", None) or source.pop("license", None)
        shown = [revision or "-", licence or "not stated"]
        counts = [f"{reading[count]:,}" if count in reading else "-" for count in ("read", "kept")]
        rows.append([f"`{code(key)}`", cell(str(path)), *map(cell, map(str, shown)), *counts])
        more = f" and {len(files) - MOST_FILES:,} more" if len(files) > MOST_FILES else ""
        asked = ", ".join(f"{name}: {value}" for name, value in source.items())
        notes.append(
            f"- `{code(key)}`: {', '.join(cell(str(file)) for file in files[:MOST_FILES]) or 'no files'}{more}"
            + (f" ({cell(asked)})" if asked else "")
        )
    columns = ["key", "path", "revision", "licence", "rows read", "rows kept"]
    return _joined(grid(columns, rows, escaped=True, numbers=2), "Files:\n\n" + "\n".join(notes))


def _of(prompts: Tallies, kind: str) -> Tallies:
    return {name: found for name, found in prompts.items() if name.partition(".")[0] == kind}


def total_by(tallies: Tallies, column: str) -> Counter[str]:
    return sum((found.names[column] for found in tallies.values()), Counter())


def _merged(tallies: Iterable[Tally], column: str, texts: str = "prompts") -> dict[str, Lengths]:
    """The lengths of several tables by a column's value."""
    merged: dict[str, Lengths] = {}
    for found in tallies:
        for (of, name), counted in getattr(found, texts).items():
            if of == column:
                merged.setdefault(name, Lengths()).update(counted)
    return merged


def most_frequent(counted: Counter[str], without: str | None = None) -> tuple[list[tuple[str, int]], list[int]]:
    """The most frequent names with their counts, by alphabet where equal, and the counts of all further ones."""
    ordered = sorted(((name, count) for name, count in counted.items() if name != without), key=lambda x: (-x[1], x[0]))
    return ordered[:MOST_ROWS], [count for _, count in ordered[MOST_ROWS:]]


def _rest(others: list[int], before: int, counts: int, after: int = 1) -> list[list[str]]:
    """A row that says what is not shown. With several columns of counts it tells the names alone."""
    if not others:
        return []
    shown = [f"{sum(others):,}"] if counts == 1 else [""] * counts
    return [[*[""] * before, f"and {len(others):,} more", *shown, *[""] * after]]


def use_case_shares(prompts: Tallies) -> dict[str, dict[str, float]]:
    """Per cent by use case of the rows whose use case is known, of each set that has one; the same keys for each."""
    counted = {kind: total_by(_of(prompts, kind), "category") for kind in SETS}
    known = {kind: found.total() - found[""] for kind, found in counted.items()}
    names = [name for name, _ in most_frequent(sum(counted.values(), Counter()), without="")[0]]
    return {kind: {name: 100 * counted[kind][name] / known[kind] for name in names} for kind in SETS if known[kind]}


def _paper_table(name: str) -> tuple[str, str]:
    kind, _, part = name.partition(".")
    return kind, "test" if kind == "prompts" and part in paper_data.TEST_PARTS else part


def paper_lengths(name: str) -> Summary | None:
    return paper_data.PROMPT_LENGTHS.get(_paper_table(name))


def _compared(name: str, ours: Lengths, paper: Summary | None) -> list[list[str]]:
    """A row of ours, and one of the paper's where it has one."""
    rows = [[name, "here", *_row(ours.summary())]]
    return rows + ([["", "*paper*", *_row(paper)]] if paper else [])


def _row(of: Summary | None) -> list[str]:
    return ["0", *["-"] * (len(SUMMARY) - 1)] if of is None else [_number(value) for value in of]


def _number(value: float) -> str:
    """`12,725`, `23.4`: one digit after the point where there is something after it."""
    return f"{value:,.1f}".removesuffix(".0")


def _signed(count: int) -> str:
    return f"{count:+,}" if count else "0"


def _share(per_cent: float) -> str:
    return f"{per_cent:.1f} %"


def _missing(what: str, column: str) -> str:
    return (
        f"No row's {what} is known. The line `columns: {{{column}: NAME}}` beside a source's `path` says which of its "
        "columns has it."
    )


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
