"""Rows of a data set → conversations (lists of messages) → tokens and roles."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from megatron_sstoken.data.tokenizer import BadRow, Encoding, Message, Span, TextTokenizer

CONTEXT, RESPONSE = 0, 1
ENCODE_BATCH = 16  # conversations: more live encodings cost more memory traffic than fewer calls save
ROLES = ("system", "user", "assistant", "tool")
FORMS = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}
ADD_MARKS = "in the chat template (--chat_template), put what the assistant says in {% generation %} marks"


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields that hold the prompt, the response and (optional, may be empty) the system text."""

    prompt: str
    response: str
    system: str | None = None

    @classmethod
    def parse(cls, text: str) -> "FieldNames":
        """`prompt=question,response=answer[,system=rules]` → names; `ValueError` for anything else."""
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        names = {key.strip(): name.strip() for key, name in pairs}
        right_keys = {"prompt", "response"} <= names.keys() <= {"prompt", "response", "system"}
        if not right_keys or len(names) < len(pairs) or not all(names.values()):
            raise ValueError(f"--fields: {text!r} must read prompt=NAME,response=NAME[,system=NAME]")
        return cls(**names)


@dataclass(frozen=True)
class TokenizedSample:
    """A conversation as tokens int32 [n] and their roles uint8 [n] (0 context, 1 response)."""

    tokens: np.ndarray
    roles: np.ndarray


def parse_row(line: bytes, fields: FieldNames | None = None) -> list[Message]:
    """One line of JSON → messages. `fields` names the columns; without it the form is found from `FORMS`.

    Keys of a message besides role and content (such as `name`) reach the chat template unchanged. Every
    assistant message counts as response, also one inside a conversational prompt. Raises `BadRow` with the
    reason.
    """
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
    if row.get("tools"):
        raise BadRow("`tools` (tool schemas) is not supported: write them into the system message")
    messages = _named_messages(row, fields) if fields else _formed_messages(row)
    _check_messages(messages)
    # a data set's unset columns arrive as null; templates tell an absent key from a present one
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def tokenize_conversations(
    tokenizer: TextTokenizer, conversations: Sequence[list[Message]]
) -> list[TokenizedSample | BadRow]:
    """Conversations → tokens and roles, in order; for a bad one, the reason.

    Roles come from the chat template's generation marks, or (a template without) from comparing token
    prefixes turn by turn. The end-of-turn token is part of the response, template text after it is not.
    Without a template a single user → assistant exchange is `[bos] prompt response eos`; `ValueError` if the
    tokenizer has no eos.
    """
    if tokenizer.template is None and tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has no end-of-sequence token, which plain text needs: "
            "add one to the tokenizer or give --chat_template"
        )
    results: list[TokenizedSample | BadRow] = []
    for start in range(0, len(conversations), ENCODE_BATCH):
        results += _tokenize_batch(tokenizer, conversations[start : start + ENCODE_BATCH])
    return results


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


@dataclass(frozen=True)
class _Plan:
    """Texts to encode; from their encodings, the sample's ids and the ranges [start, stop) of responses."""

    texts: list[str]
    assign: Callable[[list[Encoding]], tuple[list[int], list[Span]]]

    def __post_init__(self) -> None:
        try:
            "".join(self.texts).encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{error.object[error.start]!r} is half a surrogate pair, not a character") from error


def _tokenize_batch(tokenizer: TextTokenizer, conversations: Sequence[list[Message]]) -> list[TokenizedSample | BadRow]:
    make = _plan_plain if tokenizer.template is None else _plan_marks if tokenizer.marked else _plan_prefixes
    plans = [_or_bad_row(make, tokenizer, messages) for messages in conversations]
    texts = [text for plan in plans if isinstance(plan, _Plan) for text in plan.texts]
    encodings = iter(tokenizer.encode_batch(texts, positions=tokenizer.marked))
    return [
        plan if isinstance(plan, BadRow) else _or_bad_row(_carry_out, plan, list(islice(encodings, len(plan.texts))))
        for plan in plans
    ]


def _or_bad_row(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except BadRow as bad_row:
        return bad_row


def _carry_out(plan: _Plan, encodings: list[Encoding]) -> TokenizedSample:
    ids, ranges = plan.assign(encodings)
    tokens = np.array(ids, dtype=np.int32)
    roles = np.full(len(ids), CONTEXT, dtype=np.uint8)
    for start, stop in ranges:
        roles[start:stop] = RESPONSE
    if not roles[1:].any():
        raise BadRow("no response token after the first token, so there is nothing to learn")
    return TokenizedSample(tokens, roles)


def _plan_plain(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise BadRow(
            "the tokenizer has no chat template, so only one user message and one assistant message can be "
            "prepared: give a template with --chat_template"
        )

    def assign(encodings: list[Encoding]) -> tuple[list[int], list[Span]]:
        prompt, response = (encoding.ids for encoding in encodings)
        assert tokenizer.eos_id is not None, "tokenize_conversations has looked"
        head = prompt if tokenizer.bos_id is None else [tokenizer.bos_id, *prompt]
        ids = [*head, *response, tokenizer.eos_id]
        return ids, [(len(head), len(ids))]

    return _Plan([message["content"] for message in messages], assign)


def _plan_marks(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    chat = tokenizer.render(messages)
    if all(start == stop for start, stop in chat.spans):
        raise BadRow(f"the template's generation marks are empty for this conversation: {ADD_MARKS}")

    def assign(encodings: list[Encoding]) -> tuple[list[int], list[Span]]:
        (whole,) = encodings
        borders = [(whole.tokens_before(start), whole.tokens_before(stop)) for start, stop in chat.spans]
        return whole.ids, [(start, _end_of_turn(tokenizer, whole.ids, start, stop)) for start, stop in borders]

    return _Plan([chat.text], assign)


def _end_of_turn(tokenizer: TextTokenizer, ids: list[int], start: int, stop: int) -> int:
    """Where the response of the marked tokens [start, stop) ends.

    After the end-of-turn token that follows directly, else after the last one inside the marks (template text
    after it is context), else at the marks' end.
    """
    if stop < len(ids) and ids[stop] in tokenizer.end_of_turn_ids:
        return stop + 1
    return _after_last(ids, start, stop, tokenizer.end_of_turn_ids)


def _after_last(ids: list[int], start: int, stop: int, wanted: frozenset[int]) -> int:
    """Index after the last of the `wanted` tokens in [start, stop); `stop` if there is none."""
    return next((index + 1 for index in range(stop - 1, start - 1, -1) if ids[index] in wanted), stop)


def _plan_prefixes(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [tokenizer.render(messages).text]
    for turn in turns:
        texts.append(tokenizer.render(messages[:turn], add_generation_prompt=True).text)
        texts.append(tokenizer.render(messages[: turn + 1]).text if turn + 1 < len(messages) else texts[0])
    unique = list(dict.fromkeys(texts))
    places = [unique.index(text) for text in texts]
    return _Plan(unique, partial(_assign_prefixes, tokenizer, messages, turns, places))


def _assign_prefixes(
    tokenizer: TextTokenizer,
    messages: list[Message],
    turns: list[int],
    places: list[int],
    encodings: list[Encoding],
) -> tuple[list[int], list[Span]]:
    whole, *borders = (encodings[place].ids for place in places)
    ranges = []
    for turn, before, after in zip(turns, borders[::2], borders[1::2], strict=True):
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise BadRow(
                f"the tokens of the assistant's message {turn} cannot be told exactly: the conversation "
                f"rendered up to it does not give a prefix of the whole's tokens: {ADD_MARKS}"
            )
        start, stop = len(before), len(after)
        if start < stop and after[start] in tokenizer.special_ids - tokenizer.end_of_turn_ids:
            _require_generation_prompt(tokenizer, messages[:turn], turn)
        ranges.append((start, _after_last(whole, start, stop, tokenizer.special_ids | tokenizer.end_of_turn_ids)))
    return whole, ranges


def _require_generation_prompt(tokenizer: TextTokenizer, messages: list[Message], turn: int) -> None:
    """A turn may begin with a special token, but not with the role header, the generation prompt's part."""
    if tokenizer.render(messages, add_generation_prompt=True) == tokenizer.render(messages):
        raise BadRow(
            f"the template ignores add_generation_prompt, so the header of the assistant's message {turn} "
            f"would count as response: {ADD_MARKS}"
        )
