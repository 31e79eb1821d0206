"""Rows of a data set, in whatever form they come → conversations."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from megatron_sstoken.data.conversation import ROLES, BadRow, Conversation, printable
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, FieldNames, Recipe
from megatron_sstoken.data.rows.message_weights import UNWEIGHTED, learns, take_whole
from megatron_sstoken.data.rows.messages import MEDIA, MessageKeys, ParsedMessage, as_context, parse_messages
from megatron_sstoken.data.rows.row_values import check_json, decode_json, decoded, is_empty, kind, without_nulls
from megatron_sstoken.data.rows.tool_calls import parse_calls, parse_tools


@dataclass(frozen=True)
class Exchange:
    """A form of row: columns of a prompt and of the response to it."""

    prompt: str
    response: str
    additions: tuple[str, ...] = ()
    """Columns whose text follows the prompt's, after an empty line."""
    calls: bool = False
    """The response is tool calls."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.response)


@dataclass(frozen=True)
class Messages:
    """A form of row: a column with a list of messages."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    additions = ()


ADDITIONS = ("input", "context")  # Alpaca's, Dolly's
FORMS: tuple[Exchange | Messages, ...] = (
    Messages("messages"),  # OpenAI, TRL, and most others
    Messages("conversations"),  # ShareGPT, LLaMA-Factory, axolotl, NeMo
    Messages("conversation"),  # LMSYS, WildChat, ms-swift
    Exchange("prompt", "completion"),  # TRL
    Exchange("prompt", "response"),
    Exchange("query", "response"),  # ms-swift, MetaMath
    Exchange("query", "answers", calls=True),  # xLAM
    Exchange("question", "answer"),  # GSM8K
    Exchange("question", "response"),  # OpenOrca
    Exchange("input", "output"),  # NeMo
    Exchange("inputs", "targets"),  # FLAN, Aya
    Exchange("instruction", "output", ADDITIONS),  # Alpaca, LLaMA-Factory
    Exchange("instruction", "response", ADDITIONS),  # Dolly
)
_NEEDED = [frozenset(form.columns) for form in FORMS]
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
SOURCE = ("source", "dataset")
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag")
_UNSUPPORTED = frozenset((*MEDIA, *PREFERENCE))


def decode_line(line: bytes) -> dict[str, Any]:
    """One line of JSON → a row. Raises `BadRow` with the reason."""
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()  # "utf-8-sig" is Python code, and slow
    except UnicodeDecodeError as error:
        remedy = " (UTF-16?): convert the file to UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadRow(f"byte {error.start} of the line is not UTF-8{remedy}") from error
    row = decode_json(text, "invalid JSON")
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {kind(row)}")
    return row


def parse_row(row: dict[str, Any], recipe: Recipe = DEFAULT_RECIPE) -> Conversation:
    """A row → a conversation. `recipe.fields` names the columns; without it the form is found from `FORMS`.

    Assistant messages of a prompt are context, all others are trained on as far as the row's weights say so. Keys
    of a message that are not known here (such as `name`) reach the chat template unchanged. Raises `BadRow` with the
    reason, and nothing else.
    """
    if recipe.fields is None and (plain := _plain_conversation(row)):
        return plain
    try:
        return _parse(_Columns(row), recipe)
    except RecursionError as error:
        raise BadRow("nested too deeply") from error


def _plain_conversation(row: dict[str, Any]) -> Conversation | None:
    """What `_parse` makes of a row of messages that say a role and a text, and nothing else: most rows of most data."""
    messages = row.get("messages")
    if len(row) != 1 or type(messages) is not list:
        return None
    answered = False
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or type(content) is not str:
            return None
        if role == "assistant":
            if not content or content.isspace():
                return None
            answered = True
    return Conversation(messages) if answered else None


class _Columns:
    """The columns of a row that hold something; those that nothing takes are unused at the end."""

    def __init__(self, row: dict[str, Any]):
        self.names = tuple(row)
        self.left = {name: value for name, value in row.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value of a column, None if it is not there."""
        return self.left.pop(name, None)

    def take_one(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The column that holds something, and its value. Raises `BadRow` where several differ."""
        found = {name: value for name in names if not is_empty(value := self.take(name))}
        first = next(iter(found.items()), (names[0], None))
        if len(found) > 1 and any(value != first[1] for value in found.values()):
            raise BadRow(f"columns {' and '.join(found)} differ: keep one")
        return first

    def required(self, name: str) -> Any:
        if name not in self.names:
            has = ", ".join(self.names) or "nothing"
            raise BadRow(f"field `{name}` is missing; the row has: {has}: correct --fields or the row")
        return self.take(name)


def _parse(columns: _Columns, recipe: Recipe) -> Conversation:
    names = recipe.fields
    _refuse_unsupported(columns, preference=names is None)
    form = _named_form(names) if names else _find_form(columns)
    if isinstance(form, Messages):
        parsed = _parse_conversation(columns.required(form.column), form.column, _message_keys(names))
    else:
        parsed = _parse_exchange(columns, form)
    parsed = _with_system(columns, (names.system,) if names and names.system else SYSTEM, parsed)
    parsed = _with_row_weight(columns, parsed, recipe)
    _check_something_to_learn(parsed)
    name, tools = columns.take_one((names.tools,) if names and names.tools else TOOLS)
    arguments = _template_arguments(columns)
    weights = tuple(one.weight for one in parsed)
    return Conversation(
        [one.message for one in parsed],
        weights=weights if any(weight != UNWEIGHTED for weight in weights) else (),
        tools=parse_tools(tools, f"`{name}`"),
        template_arguments=arguments,
        source=_source(columns),
        unused=_unused(columns, parsed, arguments),
        notes=(*_absent(columns, names), *_says_nothing(parsed)),
    )


def _refuse_unsupported(columns: _Columns, preference: bool) -> None:
    if _UNSUPPORTED.isdisjoint(columns.left):
        return
    for name in MEDIA:
        if not is_empty(columns.left.get(name)):
            raise BadRow(f"column `{name}`: images, audio and video are not supported: remove the column")
    for name in PREFERENCE if preference else ():
        value = columns.left.get(name)
        if name in ("label", "kto_tag") and isinstance(value, bool):
            raise BadRow(
                f"column `{name}` is of preference data, which is not supported: keep the rows that are to be learnt, and "
                "remove the column"
            )
        if name not in ("label", "kto_tag") and not is_empty(value):
            raise BadRow(
                f"column `{name}` is of preference data, which is not supported: name what is to be learnt, such as "
                "--fields prompt=prompt,response=chosen or --fields messages=chosen, or remove the column"
            )


def _named_form(names: FieldNames) -> Exchange | Messages:
    if names.messages:
        return Messages(names.messages)
    assert names.prompt and names.response, "FieldNames has one of the two forms"
    return Exchange(names.prompt, names.response)


def _find_form(columns: _Columns) -> Exchange | Messages:
    fitting = [form for form, needed in zip(FORMS, _NEEDED, strict=True) if columns.left.keys() >= needed]
    # instruction, input and output are one form, not also input and output
    forms = [
        form
        for form in fitting
        if not any(set(form.columns) < {*other.columns, *other.additions} for other in fitting if other is not form)
    ]
    if len(forms) > 1:
        fits = " and ".join("/".join(form.columns) for form in forms)
        raise BadRow(f"ambiguous: the fields fit {fits}: name the ones that count with --fields, or remove the others")
    if forms:
        return forms[0]
    present = ", ".join(columns.left) or "none"
    empty = ", ".join(name for name in columns.names if name not in columns.left)
    present += f" (null: {empty})" if empty else ""
    if "text" in columns.left:
        raise BadRow(
            f"plain text has no prompt to tell the response from (fields: {present}): split it into prompt and completion"
        )
    if "segments" in columns.left:
        raise BadRow(
            "`segments` are text without roles, which is not supported: write messages, and `train` or `spans` where not "
            "all that the assistant says is to be learnt"
        )
    known = ", ".join("/".join(form.columns) for form in FORMS)
    raise BadRow(
        f"no known form in the fields: {present}: name the fields with --fields prompt=NAME,response=NAME or messages=NAME "
        f"(known: {known})"
    )


def _message_keys(names: FieldNames | None) -> MessageKeys:
    if names is None:
        return MessageKeys()
    own = {name: role for name, role in ((names.user, "user"), (names.assistant, "assistant")) if name}
    return MessageKeys(
        (names.role,) if names.role else MessageKeys.role,
        (names.content,) if names.content else MessageKeys.content,
        own,
    )


def _parse_conversation(value: Any, column: str, keys: MessageKeys) -> list[ParsedMessage]:
    """A list of messages, or of texts of user and assistant by turns (LIMA)."""
    value = decoded(value, f"`{column}`")
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return _by_turns(value)
    return parse_messages(value, column, keys)


def _by_turns(texts: list[str]) -> list[ParsedMessage]:
    roles = islice(cycle(("user", "assistant")), len(texts))
    return [ParsedMessage({"role": role, "content": text}) for role, text in zip(roles, texts, strict=True)]


def _parse_exchange(columns: _Columns, form: Exchange) -> list[ParsedMessage]:
    parsed = _parse_history(columns.take("history"))
    prompt, response = (columns.required(name) for name in form.columns)
    additions = [columns.take(name) for name in form.additions]
    for name, value in zip(form.additions, additions, strict=True):
        if value is not None and not isinstance(value, str):
            raise BadRow(f"`{name}` must be a string, not {kind(value)}")
    if any(additions) and not isinstance(prompt, str):
        raise BadRow(f"`{form.prompt}` must be a string beside {' and '.join(form.additions)}, not {kind(prompt)}")
    if isinstance(prompt, str):
        prompt = "\n\n".join(text for text in (prompt, *additions) if text)
    context = _side(prompt, form.prompt, "user")
    parsed += [as_context(one, number) for number, one in enumerate(context)]
    if form.calls:
        calls = parse_calls(response, f"`{form.response}`")
        return [*parsed, ParsedMessage({"role": "assistant", "content": "", "tool_calls": calls})]
    return parsed + _side(response, form.response, "assistant")


def _side(value: Any, column: str, role: str) -> list[ParsedMessage]:
    """A prompt or a response: a text, or a list of messages."""
    if isinstance(value, list):
        return parse_messages(value, column)
    if not isinstance(value, str):
        raise BadRow(f"`{column}` must be a string or a list of messages, not {kind(value)}")
    return [ParsedMessage({"role": role, "content": value})]


def _parse_history(value: Any) -> list[ParsedMessage]:
    """Earlier exchanges as pairs; what was answered is trained on, as in LLaMA-Factory and ms-swift."""
    if is_empty(value := decoded(value, "`history`")):
        return []
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("`history` must be a list of pairs of texts: question and answer")
    return _by_turns([text for pair in pairs for text in pair])


def _with_system(columns: _Columns, names: tuple[str, ...], parsed: list[ParsedMessage]) -> list[ParsedMessage]:
    name, system = columns.take_one(names)
    if system is None:
        return parsed
    if not isinstance(system, str):
        raise BadRow(f"`{name}` must be a string, not {kind(system)}")
    written = [one.message["content"] for one in parsed if one.message["role"] == "system"]
    if not written:
        return [ParsedMessage({"role": "system", "content": system}), *parsed]
    if written[0] != system:
        raise BadRow(f"column `{name}` differs from the conversation's own system message: keep one")
    return parsed


def _with_row_weight(columns: _Columns, parsed: list[ParsedMessage], recipe: Recipe) -> list[ParsedMessage]:
    """The row's weight is that of each assistant message without its own; of the last, if no other is trained."""
    given = {name: value for name in ("weight", "loss_weight", "train") if (value := columns.take(name)) is not None}
    weight = take_whole(given, "the row")
    if weight is None:
        return parsed
    turns = [index for index, one in enumerate(parsed) if one.message["role"] == "assistant"]
    weighed = turns if recipe.turns == "all" else turns[-1:]
    return [
        replace(one, weight=replace(one.weight, whole=weight)) if index in weighed and one.weight.whole is None else one
        for index, one in enumerate(parsed)
    ]


def _check_something_to_learn(parsed: list[ParsedMessage]) -> None:
    if not parsed:
        raise BadRow("the conversation is empty")
    turns = [one for one in parsed if one.message["role"] == "assistant" and _says(one)]
    if not turns:
        raise BadRow("no assistant message with content, so there is nothing to learn")
    if not any(learns(one.weight) for one in turns):
        raise BadRow("every assistant message has weight 0 or is part of the prompt, so there is nothing to learn")


def _template_arguments(columns: _Columns) -> dict[str, Any]:
    name = "chat_template_kwargs"
    if is_empty(value := decoded(columns.take(name), f"`{name}`")):
        return {}
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` must be an object, not {kind(value)}")
    check_json(value, f"`{name}`")
    return without_nulls(value)


def _source(columns: _Columns) -> str | None:
    """The label of the row; a column of that name that holds no text is not one."""
    for name in SOURCE:
        if isinstance(columns.left.get(name), str) and columns.left[name]:
            return printable(columns.take(name))
    return None


def _absent(columns: _Columns, names: FieldNames | None) -> Iterator[str]:
    """Notes on columns that the user named and a row may lack; where all rows do, the name is probably wrong."""
    for name in (names.system, names.tools) if names else ():
        if name and name not in columns.names:
            yield f"column `{name}`, which --fields names, is not there"


def _says_nothing(parsed: list[ParsedMessage]) -> Iterator[str]:
    if any(one.message["role"] == "assistant" and not _says(one) and learns(one.weight) for one in parsed):
        yield "an assistant message is empty: the model learns to end its turn at once (weight 0 makes it context)"


def _says(parsed: ParsedMessage) -> bool:
    message = parsed.message
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _unused(columns: _Columns, parsed: list[ParsedMessage], arguments: dict[str, Any]) -> tuple[str, ...]:
    names = [name for name, value in columns.left.items() if not is_empty(value)]
    names += [f"messages.{key}" for one in parsed for key in one.unused]
    names += [f"chat_template_kwargs.{key}" for key in arguments]
    return tuple(dict.fromkeys(map(printable, names)))
