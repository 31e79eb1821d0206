"""Rows of a data set, in whatever form they come → conversations."""

import json
from typing import Any

from megatron_sstoken.data.conversation import ROLES, BadRow, Conversation, Message
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, FieldNames, Recipe

FORMS = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}


def decode_line(line: bytes) -> dict[str, Any]:
    """One line of JSON → a row. Raises `BadRow` with the reason."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"invalid JSON: {error}") from error
    except RecursionError as error:
        raise BadRow("invalid JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {_kind(row)}")
    return row


def parse_row(row: dict[str, Any], recipe: Recipe = DEFAULT_RECIPE) -> Conversation:
    """A row → a conversation. `recipe.fields` names the columns; without it the form is found from `FORMS`.

    Keys of a message besides role and content (such as `name`) reach the chat template unchanged. Every
    assistant message counts as response, also one inside a conversational prompt. Raises `BadRow` with the
    reason.
    """
    if row.get("tools"):
        raise BadRow("`tools` (tool schemas) is not supported: write them into the system message")
    messages = _named_messages(row, recipe.fields) if recipe.fields else _formed_messages(row)
    _check_messages(messages)
    # a data set's unset columns arrive as null; templates tell an absent key from a present one
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return Conversation(present)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object: keep one")
    return row


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow(f"field `{key}` is missing; the row has: {', '.join(row) or 'nothing'}")
    if not isinstance(row[key], str):
        raise BadRow(f"`{key}` must be a string, not {_kind(row[key])}")
    return row[key]


def _exchange(prompt: str, response: str, system: str = "") -> list[Message]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _named_messages(row: dict[str, Any], fields: FieldNames) -> list[Message]:
    system = "" if fields.system is None or row.get(fields.system) is None else _text(row, fields.system)
    return _exchange(_text(row, fields.prompt), _text(row, fields.response), system)


def _formed_messages(row: dict[str, Any]) -> list[Message]:
    forms = [form for form, keys in FORMS.items() if row.keys() >= set(keys)]
    if not forms:
        raise BadRow(
            f"no known form ({', '.join(FORMS)}) in the fields: {', '.join(row) or 'none'}: "
            "name the fields with --fields"
        )
    if len(forms) > 1:
        raise BadRow(f"ambiguous: the fields fit {' and '.join(forms)}: keep one, or name the fields with --fields")
    if forms == ["messages"]:
        return row["messages"]
    if forms == ["instruction/output"]:
        parts = [_text(row, "instruction"), _text(row, "input") if row.get("input") is not None else ""]
        return _exchange("\n\n".join(part for part in parts if part), _text(row, "output"))
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return row["prompt"] + row["completion"]
    return _exchange(_text(row, "prompt"), _text(row, "completion"))


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise BadRow(f"`messages` must be a list, not {_kind(messages)}")
    if not messages:
        raise BadRow("the conversation is empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} must be an object with role and content, not {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"must be a string, not {_kind(message[key])}" if key in message else "is missing"
                raise BadRow(f"`{key}` of message {number} {problem}")
        if message["role"] not in ROLES:
            raise BadRow(f"role {message['role']!r} of message {number} is none of {', '.join(ROLES)}")
    turns = [message for message in messages if message["role"] == "assistant"]
    if not any(turn["content"] or turn.get("tool_calls") for turn in turns):
        raise BadRow("no assistant message with content, so there is nothing to learn")
