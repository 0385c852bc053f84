"""From a source's raw rows to ours: columns renamed, chats flattened, and what is wrong said in one sentence.

Chats. Where text is expected, a list of messages `[{"role": ..., "content": ...}]` is accepted too. A single message
becomes its content; several become `User: ...`, `Assistant: ...`, one paragraph each. A response is the content of
the last message, so that it may repeat the conversation before it. `chosen` and `rejected` may repeat the conversation
and leave `prompt` out: what both share is the prompt (lists of messages, or text in the form of Anthropic's hh-rlhf,
whose paragraphs begin with `Human:` and `Assistant:`).
"""

import json
import math
from collections.abc import Callable
from difflib import get_close_matches

from instructrl.config import Source
from instructrl.errors import UserError
from instructrl.stages.sources import Row

FORMS = {
    "demonstrations": (("prompt", "response"), ("messages",)),
    "rankings": (("prompt", "responses", "ranks"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "prompts": (("prompt",),),
    "text": (("text",),),
    "labels": (("prompt", "model_a", "model_b", "winner"), ("prompt", "model", "score")),
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
    "demonstrations": ("source",),
    "rankings": ("annotators", "labeler", "source"),
    "prompts": ("category", "kind", "source"),
    "text": ("kind",),
    "labels": (),
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


class Invalid(Exception):
    """What is wrong with one row."""


def record(row: Row, kind: str, source: Source, key: str) -> dict:
    """One row of `demonstrations`, `rankings`, `prompts` or `text`, with columns of `stages.tables`; or of `labels`.

    Raises:
        UserError: a column is missing; names the columns there are and the line of YAML to write.
        Invalid: the row is wrong in another way.
    """
    form = check_columns(row, kind, source, key)
    return _MAKERS[kind](_Fields(row, source), form)


def invalid(row: Row, problem: Invalid, key: str) -> UserError:
    """The error for a row that is wrong and may not be skipped."""
    return UserError(
        f"{key}: {row.where}: {problem}. Correct the row, or add `skip_invalid: true` beside `path:` "
        "to drop and count such rows"
    )


def check_columns(row: Row, kind: str, source: Source, key: str) -> tuple[str, ...]:
    """The form of the row: the first whose columns are all there.

    Raises:
        UserError: `columns` names one that is not there, renames none of ours, or makes one of several that cannot be;
            or a column is missing.
    """
    known = sorted({column for form in FORMS[kind] for column in form} | set(OPTIONAL[kind]))
    there = list(row.values)
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise UserError(
                f"{key}.columns: {ours} is no column of {kind}{_nearest(ours, known)}; they have {', '.join(known)}"
            )
        if not isinstance(theirs, str) and ours not in JOINED[kind]:
            raise _not_joined(ours, "", key)
        for name in (theirs,) if isinstance(theirs, str) else theirs:
            if name not in row.values:
                raise UserError(
                    f"{key}.columns: {row.where} has no column {name!r}{_nearest(name, there)}; its columns are "
                    f"{', '.join(map(repr, there))}"
                )
    fields = _Fields(row, source)
    for form in FORMS[kind]:
        if all(column in fields for column in form):
            several = [name for name in form if not isinstance(source.columns.get(name, name), str)]
            if several and form == ("chosen", "rejected"):
                raise _not_joined(several[0], " where there is no prompt column", key)
            return form
    form = max(FORMS[kind], key=lambda form: sum(column in fields for column in form))
    missing = [column for column in form if column not in fields]
    names = {column: _suggestion(column, there) for column in missing}
    line = ", ".join(f"{column}: {name or 'NAME'}" for column, name in names.items())
    raise UserError(
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


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _Fields:
    """A row's values under our names, with `columns` applied."""

    def __init__(self, row: Row, source: Source) -> None:
        self.values = row.values
        self.columns = source.columns

    def __contains__(self, column: str) -> bool:
        return column in self.columns or column in self.values

    def text(self, column: str) -> str:
        """A text that is not empty; several columns are joined by a blank line, empty ones left out."""
        theirs = self.columns.get(column, column)
        if isinstance(theirs, str):
            return _text(self.values[theirs], theirs)
        parts = [_text(self.values[name], name, may_be_empty=True) for name in theirs]
        return _not_empty("\n\n".join(part for part in parts if part.strip()), " + ".join(theirs))

    def reply(self, column: str) -> str:
        """A response that is not empty."""
        theirs = self.columns.get(column, column)
        return _reply(self.values[theirs], theirs) if isinstance(theirs, str) else self.text(column)

    def note(self, column: str) -> str:
        """An optional text: "" if it is missing or null."""
        theirs = self.columns.get(column, column)
        value = self.values.get(theirs) if isinstance(theirs, str) else None
        return "" if value is None else str(value)

    def list(self, column: str) -> list:
        """A list: of several columns' values, or one column's, written as JSON where a format has no lists (CSV)."""
        theirs = self.columns.get(column, column)
        if not isinstance(theirs, str):
            return [self.values[name] for name in theirs]
        value = self.values[theirs]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise Invalid(f"{theirs} is a string, but must be a list") from None
        if not isinstance(value, list):
            raise Invalid(f"{theirs} is {_kind(value)}, but must be a list")
        return value


def _demonstration(fields: _Fields, form: tuple[str, ...]) -> dict:
    if form == ("messages",):
        messages = _messages(fields.list("messages"), "messages")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise Invalid("messages must end with an assistant's message that answers another")
        prompt, response = _flat(messages[:-1]), _not_empty(messages[-1]["content"], "the last message")
    else:
        prompt, response = fields.text("prompt"), fields.reply("response")
    return {"prompt": prompt, "response": response, "source": fields.note("source")}


def _prompt(fields: _Fields, form: tuple[str, ...]) -> dict:
    notes = {column: fields.note(column) for column in OPTIONAL["prompts"]}
    return {"prompt": fields.text("prompt")} | notes


def _document(fields: _Fields, form: tuple[str, ...]) -> dict:
    return {"text": fields.text("text"), "kind": fields.note("kind")}


def _ranking(fields: _Fields, form: tuple[str, ...]) -> dict:
    if "ranks" in form:
        prompt = fields.text("prompt")
        responses = [_reply(value, f"response {n}") for n, value in enumerate(fields.list("responses"), 1)]
        ranks = _ranks(fields.list("ranks"), len(responses), "ranks")
    else:
        prompt, responses = _pair(fields, form)
        ranks = [1, 2]
    if len(responses) < 2:
        raise Invalid(f"a ranking needs two responses or more, but there is {len(responses)}")
    if len(set(responses)) == 1:
        raise Invalid("all responses are the same")
    annotators = fields.list("annotators") if fields.values.get("annotators") or "annotators" in fields.columns else []
    return {
        "prompt": prompt,
        "responses": responses,
        "ranks": ranks,
        "annotators": _annotators(annotators, len(responses)),
        "labeler": fields.note("labeler"),
        "source": fields.note("source"),
    }


def _ranks(values: list, expected: int, what: str) -> list[int]:
    """Whole numbers, one for each response. 2.0 is whole (tables with gaps store floats), and so is "2" (CSV)."""
    if len(values) != expected:
        raise Invalid(f"{what} has {len(values)} entries, but there are {expected} responses")
    ranks = []
    for value in values:
        number = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number % 1:
            raise Invalid(f"{what} holds {value!r}, but a rank is a whole number: 1 for the best, equal for a tie")
        ranks.append(int(number))
    return ranks


def _annotators(values: list, responses: int) -> list[list[int]]:
    """Each annotator's ranks. For two responses also each annotator's choice: 1 or 2 is better, 0 is a tie."""
    if values and not any(isinstance(value, list) for value in values):
        choices = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
        if responses != 2 or any(isinstance(value, bool | dict) or value not in choices for value in values):
            raise Invalid("annotators must be a list of ranks for each annotator, or for two responses 0, 1 or 2 each")
        return [choices[value] for value in values]
    for number, value in enumerate(values, 1):
        if not isinstance(value, list):
            raise Invalid(f"annotators entry {number} is {_kind(value)}, but must be a list of ranks")
    return [_ranks(value, responses, f"annotators entry {n}") for n, value in enumerate(values, 1)]


def _pair(fields: _Fields, form: tuple[str, ...]) -> tuple[str, list[str]]:
    """Prompt and [chosen, rejected]."""
    if "prompt" in form:
        return fields.text("prompt"), [fields.reply("chosen"), fields.reply("rejected")]
    chosen, rejected = (fields.values[str(fields.columns.get(name, name))] for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise Invalid("chosen and rejected must share all messages but the last where there is no prompt column")
        last = [
            _not_empty(messages[-1]["content"], name) for messages, name in ((chosen, "chosen"), (rejected, "rejected"))
        ]
        return _flat(chosen[:-1]), last
    texts = [_text(chosen, "chosen"), _text(rejected, "rejected")]
    return _dialogue(*texts)


def _label(fields: _Fields, form: tuple[str, ...]) -> dict:
    """{prompt, model_a, model_b, winner} or {prompt, model, score}; a score is any finite number, higher is better."""
    label: dict[str, object] = {column: fields.text(column) for column in form if column != "score"}
    if "score" in form:
        value = fields.values[str(fields.columns.get("score", "score"))]
        try:
            label["score"] = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            label["score"] = math.nan
        if not math.isfinite(label["score"]):
            raise Invalid(f"score is {value!r}, but must be a number")
    return label


TURN = "\n\nAssistant:"


def _dialogue(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Split two dialogues in the form of hh-rlhf after the last `Assistant:` that both share."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    cut = chosen[:shared].rfind(TURN)
    if cut < 0:
        raise Invalid("there is no prompt column, and chosen and rejected do not begin with the same conversation")
    cut += len(TURN)
    responses = [_not_empty(text[cut:].strip(), name) for text, name in ((chosen, "chosen"), (rejected, "rejected"))]
    return chosen[:cut].strip(), responses


def _text(value: object, name: str, may_be_empty: bool = False) -> str:
    """A string, or the flattened messages of a chat."""
    if isinstance(value, list):
        value = _flat(_messages(value, name))
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise Invalid(f"{name} is {_kind(value)}, but must be a string")
    return value if may_be_empty else _not_empty(value, name)


def _reply(value: object, name: str) -> str:
    """A string, or the last message of a chat."""
    return _not_empty(_messages(value, name)[-1]["content"], name) if isinstance(value, list) else _text(value, name)


def _messages(value: list, name: str) -> list[dict[str, str]]:
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise Invalid(f'{name} is a list, but not of messages {{"role": ..., "content": ...}}')
    if not value:
        raise Invalid(f"{name} is an empty list")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _flat(messages: list[dict[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise Invalid(f"{name} is empty")
    return text


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")


_MAKERS: dict[str, Callable[[_Fields, tuple[str, ...]], dict]] = {
    "demonstrations": _demonstration,
    "rankings": _ranking,
    "prompts": _prompt,
    "text": _document,
    "labels": _label,
}
