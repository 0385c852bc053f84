"""Chats as text: lists of messages flattened, dialogues split, and texts that are none refused.

Where text is expected, a list of messages `[{"role": ..., "content": ...}]` is accepted too. A single message becomes
its content; several become `System: ...`, `User: ...`, `Assistant: ...`, one paragraph each.
"""

import re
import unicodedata

from instructrl.columns import Invalid, brief

ROLES = {"prompter": "user", "human": "user", "bot": "assistant", "gpt": "assistant", "model": "assistant"}
"""What other data sets call the roles that we know; any other role is kept."""

TURN = "\n\nAssistant:"
SURROGATE = re.compile("[\ud800-\udfff]")


def text(value: object, name: str, may_be_empty: bool = False) -> str:
    """A string, or the flattened messages of a chat."""
    if isinstance(value, list):
        value = flat(messages(value, name))
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise Invalid(f"{name} is {kind(value)}, but must be a string")
    return encodable(value, name) if may_be_empty else not_empty(value, name)


def reply(value: object, name: str) -> str:
    """A string, or the last message of a chat."""
    return not_empty(messages(value, name)[-1]["content"], name) if isinstance(value, list) else text(value, name)


def messages(value: list, name: str) -> list[dict[str, str]]:
    """Messages with our names for the roles. An empty system message is left out, no other may be empty."""
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise Invalid(f'{name} is a list, but not of messages {{"role": ..., "content": ...}}')
    said = [{"role": _role(message["role"]), "content": message["content"]} for message in value]
    said = [message for message in said if message["role"] != "system" or not is_empty(message["content"])]
    if not said:
        raise Invalid(f"{name} is an empty list")
    for number, message in enumerate(said, 1):
        not_empty(message["content"], f"message {number} of {name}")
    return said


def _role(role: str) -> str:
    return ROLES.get(role.lower(), role.lower())


def flat(said: list[dict[str, str]]) -> str:
    """One message's content, or a paragraph for each of several."""
    if len(said) == 1:
        return said[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in said)


def split_dialogues(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Prompt and two responses, from two dialogues in hh-rlhf's form: cut after the last `Assistant:` they share."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    cut = chosen[:shared].rfind(TURN)
    if cut < 0:
        raise Invalid("there is no prompt column, and chosen and rejected do not begin with the same conversation")
    cut += len(TURN)
    responses = [not_empty(whole[cut:].strip(), name) for whole, name in ((chosen, "chosen"), (rejected, "rejected"))]
    return chosen[:cut].strip(), responses


def split_messages(chosen: list, rejected: list) -> tuple[str, list[str]]:
    """Prompt and two responses, from two lists of messages that differ in the last."""
    chosen, rejected = messages(chosen, "chosen"), messages(rejected, "rejected")
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise Invalid("chosen and rejected must share all messages but the last where there is no prompt column")
    return flat(chosen[:-1]), [chosen[-1]["content"], rejected[-1]["content"]]


def not_empty(value: str, name: str) -> str:
    """The text, if anyone can read it."""
    if is_empty(value):
        raise Invalid(f"{name} is empty")
    return encodable(value, name)


def is_empty(value: str) -> bool:
    """Whether there is nothing but white space, control and zero-width characters (Unicode categories Cc and Cf)."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in value)


def encodable(value: str, name: str) -> str:
    """The text, if it can be written: half of a surrogate pair, which JSON may hold, is no character."""
    if not value.isascii() and (half := SURROGATE.search(value)):
        code = f"\\u{ord(half[0]):04x}"
        raise Invalid(f"{name} holds {code} at character {half.start() + 1}, half of a surrogate pair")
    return value


def kind(value: object) -> str:
    """What a value is, for an error."""
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    number = f"the number {brief(value)}" if isinstance(value, int | float) else type(value).__name__
    return names.get(type(value), number)
