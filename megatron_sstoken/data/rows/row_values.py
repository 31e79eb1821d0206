"""Values of a row: decoded, named in messages, cleared of what is not there."""

import json
from typing import Any

from megatron_sstoken.data.conversation import BadRow


def decode_json(text: str, what: str) -> Any:
    """A JSON text → its value. Raises `BadRow` that begins with `what`."""
    text = text.strip(" \t\n\r")
    try:
        value, end = _DECODER.raw_decode(text)  # `decode` looks for the spaces with two regular expressions
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except json.JSONDecodeError as error:
        raise BadRow(f"{what}: {error}") from error
    except RecursionError as error:
        raise BadRow(f"{what}: nested too deeply") from error
    except BadRow:
        raise
    except ValueError as error:  # Python's limit, against texts that take it minutes
        raise BadRow(f"{what}: a number has more than 4,300 digits: write it as a text, or remove it") from error


def decoded(value: Any, what: str) -> Any:
    """The value, which may be given as JSON text (as in Parquet and CSV)."""
    if not isinstance(value, str):
        return value
    python = " (it looks like Python's way to write it, as pandas' to_csv does)" if "'" in value[:40] else ""
    return decode_json(value, f"{what} is a text, but not JSON{python}")


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing. 0 and false are something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def kind(value: Any) -> str:
    """What a value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    numbers = {int: "a number", float: "a number"}
    return (names | numbers).get(type(value), f"a value of type {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth.

    Tables (Parquet, Arrow) give every object of a column the keys of all: what an object lacks is null there.
    TRL leaves nulls out in the same way.
    """
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def check_json(value: Any, what: str) -> None:
    """Raise `BadRow` unless JSON can write the value: templates do so with `tojson`."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise BadRow(f"{what} holds NaN or an infinite number, which JSON does not know: correct it") from error
    except TypeError as error:
        raise BadRow(f"{what} cannot be written as JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"key {twice!r} occurs twice in one object: keep one")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
