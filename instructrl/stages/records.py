"""From a source's raw rows to ours: columns found, chats flattened, and what is wrong said in one sentence.

A response is the content of a chat's last message, so that it may repeat the conversation before it. `chosen` and
`rejected` may repeat the conversation and leave `prompt` out: what both share is the prompt (lists of messages, or text
in the form of Anthropic's hh-rlhf, whose paragraphs begin with `Human:` and `Assistant:`).
"""

import math
from collections.abc import Callable, Iterator
from difflib import get_close_matches

from instructrl import columns
from instructrl.columns import Invalid, nearest
from instructrl.config import Source
from instructrl.errors import UserError
from instructrl.stages import chats, ratings
from instructrl.stages.fields import NOTES, Fields
from instructrl.stages.readers import Row

FORMS = {
    "demonstrations": (("prompt", "response"), ("messages",), ("instruction", "examples")),
    "rankings": (("prompt", "responses", "ranks"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "prompts": (("prompt",),),
    "text": (("text",),),
    "labels": (("prompt", "model_a", "model_b", "winner"), ("prompt", "model", "score"), ("prompt", "model", "likert")),
}
"""The columns a row must have: one of the forms, the first of which is the usual one."""

JOINED = {
    "demonstrations": ("prompt", "response"),
    "rankings": ("prompt", "responses", "ranks", "annotators", "chosen", "rejected"),
    "prompts": ("prompt",),
    "text": ("text",),
    "labels": ("prompt",),
}
"""The columns that may be made of several of theirs: text, or a list. `chosen` and `rejected` only beside a prompt."""

OPTIONAL = {
    "demonstrations": NOTES,
    "rankings": ("annotators", "labeler", *NOTES),
    "prompts": NOTES,
    "text": ("kind",),
    "labels": ratings.FIELDS,
}

ALSO_CALLED = {
    "prompt": ("instruction", "question", "query", "input", "context", "user"),
    "response": ("output", "completion", "answer", "target", "reply", "demonstration"),
    "responses": ("completions", "answers", "outputs", "candidates"),
    "ranks": ("rank", "ranking", "rankings", "order"),
    "chosen": ("preferred", "better", "winner", "accepted"),
    "rejected": ("dispreferred", "worse", "loser"),
    "text": ("content", "document", "body", "story", "page"),
    "messages": ("conversation", "conversations", "dialogue"),
}
"""What other data sets call our columns, to suggest the line of YAML that renames them."""


HEAD = 100
"""Rows that may be read to see which columns there are."""

HIGHEST_RANK = 2**53
"""Whole numbers up to here are exact as a float."""


def record(row: Row, kind: str, source: Source, key: str) -> list[dict]:
    """What a row of `demonstrations`, `rankings`, `prompts`, `text` or `labels` gives, with columns of `stages.tables`.

    One record, or none where `source.where` leaves the row out, or of a few-shot prompt one for each example (paper,
    App. A.1).

    Raises:
        Invalid: the row is wrong, or lacks a column that others have.
    """
    if not columns.holds(source.where, row.values):
        return []
    fields = Fields(row, source)
    form = _form(fields, kind)
    if not form:
        there = ", ".join(map(repr, row.values)) or "(none)"
        raise Invalid(f"there is no {' and no '.join(map(repr, _lacks(fields, kind)))}; its columns are {there}")
    return _MAKERS[kind](fields, form)


def checked(rows: Iterator[Row], kind: str, source: Source, key: str) -> Iterator[Row]:
    """The same rows, after `check_columns` on the first: or, where rows of JSON lack what is null in them, on what the
    first `HEAD` have together. Holds back no more rows than that takes.

    Raises:
        UserError: as `check_columns`.
    """
    head: list[Row] = []
    seen: dict[str, object] = {}
    problem = None
    for row in rows:
        head.append(row)
        seen = row.values | seen
        try:
            check_columns(Row(seen, head[0].where), kind, source, key)
            problem = None
            break
        except UserError as error:
            problem = error
            if len(head) == HEAD:
                break
    if problem:
        raise problem
    yield from head
    yield from rows


def invalid(row: Row, problem: Invalid, key: str) -> UserError:
    """The error for a row that is wrong and may not be skipped."""
    return UserError(
        f"{key}: {row.where}: {problem}. Correct the row, or add `skip_invalid: true` beside `path:` "
        "to drop and count such rows"
    )


def check_columns(row: Row, kind: str, source: Source, key: str) -> None:
    """See that the row has the columns of a form, and all that the source names.

    Raises:
        UserError: `columns` or `where` names one that is not there, `columns` renames none of ours, or makes one of
            several that cannot be; or a column is missing.
    """
    known = sorted({column for form in FORMS[kind] for column in form} | set(OPTIONAL[kind]))
    for ours, rule in source.columns.items():
        if ours not in known:
            raise UserError(
                f"{key}.columns: {ours} is no column of {kind}{nearest(ours, known)}; they have {', '.join(known)}"
            )
        if isinstance(rule, tuple) and ours not in JOINED[kind]:
            raise _not_joined(ours, "", key)
        if isinstance(rule, dict) and "choice" in rule and ours != "ranks":
            raise UserError(f"{key}.columns: {ours} cannot be made from a choice, only ranks can")
        for path in columns.names(rule):
            _check_column(path, row, f"{key}.columns")
    for path in source.where:
        _check_column(path, row, f"{key}.where")
    fields = Fields(row, source)
    form = _form(fields, kind)
    if not form:
        raise _missing(row, kind, fields, key)
    several = [name for name in form if isinstance(source.columns.get(name), tuple)]
    if several and form == ("chosen", "rejected"):
        raise _not_joined(several[0], " where there is no prompt column", key)


def _form(fields: Fields, kind: str) -> tuple[str, ...]:
    """The form of a row: the first whose columns are all there; () for none."""
    return next((form for form in FORMS[kind] if all(column in fields for column in form)), ())


def _lacks(fields: Fields, kind: str) -> list[str]:
    """What is missing of the form that is nearest to the row's."""
    forms = [form for form in FORMS[kind] if "examples" not in form or "examples" in fields]
    form = max(forms, key=lambda form: sum(column in fields for column in form))
    return [column for column in form if column not in fields]


def _check_column(path: str, row: Row, key: str) -> None:
    name = columns.head(path, row.values)
    if name not in row.values:
        there = list(row.values)
        raise UserError(
            f"{key}: {row.where} has no column {name!r}{nearest(name, there)}; its columns are "
            f"{', '.join(map(repr, there))}"
        )


def _missing(row: Row, kind: str, fields: Fields, key: str) -> UserError:
    there = list(row.values)
    missing = _lacks(fields, kind)
    names = {column: _suggestion(column, there) for column in missing}
    line = ", ".join(f"{column}: {name or 'NAME'}" for column, name in names.items())
    return UserError(
        f"{key}: {row.where} has no column {' and no column '.join(map(repr, missing))}; its columns are "
        f"{', '.join(map(repr, there)) or '(none)'}. Say which it is with this line beside `path:`:  "
        f"columns: {{{line}}}"
    )


def _not_joined(column: str, condition: str, key: str) -> UserError:
    return UserError(
        f"{key}.columns: {column} must be the name of one column{condition}, not a list: columns: {{{column}: NAME}}"
    )


def _suggestion(column: str, there: list[str]) -> str:
    """The name that most likely means this column, or ""."""
    lowered = {name.lower(): name for name in there}
    near = next((lowered[name] for name in ALSO_CALLED.get(column, ()) if name in lowered), None)
    return near or next((lowered[name] for name in get_close_matches(column, lowered, n=1)), "")


def _demonstration(fields: Fields, form: tuple[str, ...]) -> list[dict]:
    if "examples" in form:
        return _few_shot(fields)
    if form == ("messages",):
        messages = chats.messages(fields.list("messages"), fields.name("messages"))
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise Invalid("messages must end with an assistant's message that answers another")
        prompt, response = chats.flat(messages[:-1]), messages[-1]["content"]
    else:
        prompt, response = fields.text("prompt"), fields.reply("response")
    return [{"prompt": prompt, "response": response, **fields.notes()}]


def _few_shot(fields: Fields) -> list[dict]:
    """K records from K examples: the query of each is answered after the instruction and the K - 1 others.

    Paper, App. A.1. It prints no form: ours is a paragraph for the instruction, one for each example, the query on one
    line and its response on the next, and one for the query that is to be answered.
    """
    instruction, examples = fields.text("instruction"), fields.list("examples")
    pairs = []
    for number, example in enumerate(examples, 1):
        what = f"example {number}"
        if not isinstance(example, dict) or not {"query", "response"} <= example.keys():
            raise Invalid(f"{what} is no object {{query, response}}")
        query, response = (chats.text(example[part], f"the {part} of {what}") for part in ("query", "response"))
        pairs.append((query, response))
    if len(pairs) < 2:
        raise Invalid(f"a few-shot prompt needs two examples or more, but there is {len(pairs)}")
    notes = fields.notes()
    notes["kind"] = notes["kind"] or "few_shot"
    found = []
    for number, (query, response) in enumerate(pairs):
        shown = [f"{asked}\n{answered}" for asked, answered in pairs[:number] + pairs[number + 1 :]]
        found.append({"prompt": "\n\n".join([instruction, *shown, query]), "response": response, **notes})
    return found


def _prompt(fields: Fields, form: tuple[str, ...]) -> list[dict]:
    return [{"prompt": fields.text("prompt"), **fields.notes()}]


def _document(fields: Fields, form: tuple[str, ...]) -> list[dict]:
    return [{"text": fields.text("text"), "kind": fields.note("kind")}]


def _ranking(fields: Fields, form: tuple[str, ...]) -> list[dict]:
    if "ranks" in form:
        prompt = fields.text("prompt")
        responses = [chats.reply(value, f"response {n}") for n, value in enumerate(fields.list("responses"), 1)]
        ranks = _ranks(fields.list("ranks", len(responses)), len(responses), "ranks")
    else:
        prompt, responses = _pair(fields, form)
        ranks = [1, 2]
    if len(responses) < 2:
        raise Invalid(f"a ranking needs two responses or more, but there is {len(responses)}")
    if len(set(responses)) == 1:
        raise Invalid("all responses are the same")
    annotators = fields.list("annotators") if fields.has("annotators") else []
    return [
        {
            "prompt": prompt,
            "responses": responses,
            "ranks": ranks,
            "annotators": _annotators(annotators, len(responses)),
            "labeler": fields.note("labeler"),
            **fields.notes(),
        }
    ]


def _ranks(values: list, expected: int, what: str) -> list[int]:
    """Whole numbers, one for each response, shifted so that the best is 1.

    2.0 is whole (tables with gaps store floats), and so is "2" (CSV).
    """
    if len(values) != expected:
        raise Invalid(f"{what} has {len(values)} entries, but there are {expected} responses")
    ranks = []
    for value in values:
        number = columns.number(value) if isinstance(value, str | int | float) else math.nan
        if not abs(number) <= HIGHEST_RANK or number % 1:
            shown = columns.brief(value)
            raise Invalid(f"{what} holds {shown}, but a rank is a whole number: 1 for the best, equal for a tie")
        ranks.append(int(number))
    return [rank - min(ranks) + 1 for rank in ranks]


def _annotators(values: list, responses: int) -> list[list[int]]:
    """Each annotator's ranks. For two responses also each annotator's choice: 1 or 2 is better, 0 is a tie."""
    if values and not any(isinstance(value, list) for value in values):
        choices = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
        if responses != 2 or any(isinstance(value, bool | dict) or value not in choices for value in values):
            raise Invalid("annotators must be a list of ranks for each annotator, or for two responses 0, 1 or 2 each")
        return [choices[value] for value in values]
    for number, value in enumerate(values, 1):
        if not isinstance(value, list):
            raise Invalid(f"annotators entry {number} is {chats.kind(value)}, but must be a list of ranks")
    return [_ranks(value, responses, f"annotators entry {n}") for n, value in enumerate(values, 1)]


def _pair(fields: Fields, form: tuple[str, ...]) -> tuple[str, list[str]]:
    """Prompt and [chosen, rejected]."""
    if "prompt" in form:
        return fields.text("prompt"), [fields.reply("chosen"), fields.reply("rejected")]
    chosen, rejected = fields.value("chosen"), fields.value("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return chats.split_messages(chosen, rejected)
    return chats.split_dialogues(chats.text(chosen, "chosen"), chats.text(rejected, "rejected"))


def _label(fields: Fields, form: tuple[str, ...]) -> list[dict]:
    """{prompt, model_a, model_b, winner}, or {prompt, model, score, ratings}: a score is any finite number, higher is
    better, and `likert` where there is none; ratings are those of `stages.ratings` that the row has."""
    if "winner" in form:
        return [{column: fields.text(column) for column in form}]
    label: dict[str, object] = {"prompt": fields.text("prompt"), "model": fields.text("model")}
    rated = {name: ratings.read(name, fields.value(name)) for name in ratings.FIELDS if fields.has(name)}
    label["ratings"] = {name: value for name, value in rated.items() if value is not None}
    value = fields.value(form[-1])
    label["score"] = columns.number(value)
    if not math.isfinite(label["score"]):
        raise Invalid(f"{form[-1]} is {value!r}, but must be a number")
    return [label]


_MAKERS: dict[str, Callable[[Fields, tuple[str, ...]], list[dict]]] = {
    "demonstrations": _demonstration,
    "rankings": _ranking,
    "prompts": _prompt,
    "text": _document,
    "labels": _label,
}
