"""Messages in the forms that people write → messages as chat templates read them, with their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sstoken.data.conversation import REASONING_KEYS, ROLES, BadRow, Message, MessageWeight
from megatron_sstoken.data.rows.message_weights import (
    UNWEIGHTED,
    WeightedSpan,
    says_more_than_zero,
    take_weight,
    take_whole,
)
from megatron_sstoken.data.rows.row_values import decoded, is_empty, kind
from megatron_sstoken.data.rows.tool_calls import parse_calls

ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response"),
}
"""What each of `ROLES` is called, in any case of letters: OpenAI, ShareGPT, LLaMA-Factory, axolotl, ms-swift, Llama."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages whose content is a call, as JSON (LLaMA-Factory, ms-swift): the assistant's."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
CALL_PARTS = ("tool_call", "tool_calls")  # LLaMA-Factory's, as JSON text
USE_PART, RESULT_PART = "tool_use", "tool_result"  # Anthropic's, the latter in messages of the user
PART_KEYS = ("text", "value", "content", *REASONING_PARTS)
"""Keys of a part's text: OpenAI's, LLaMA-Factory's, axolotl's, Anthropic's and Mistral's."""

_ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names} | dict.fromkeys(CALL_ROLES, "assistant")
_CANONICAL = ("role", "content", "tool_calls", REASONING_KEYS[0])


@dataclass(frozen=True)
class MessageKeys:
    """What a data set calls the keys and roles of its messages."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=dict)
    """The data set's own names of roles → one of `ROLES`."""

    def find_role(self, name: Any, number: int) -> tuple[str, bool]:
        """One of `ROLES`, and whether the content is a call. Raises `BadRow`."""
        if not isinstance(name, str):
            problem = "is missing" if name is None else f"must be a string, not {kind(name)}"
            raise BadRow(f"`{self.role[0]}` of message {number} {problem}")
        if name in ROLES and not self.roles:
            return name, False
        if own := self.roles.get(name):
            return own, False
        known = name.strip().lower()
        if known not in _ROLES:
            names = ", ".join([*_ROLES, *self.roles])
            raise BadRow(
                f"role {name!r} of message {number} is none of {names}: correct it, or name the roles with --fields "
                "messages=NAME,user=ROLE,assistant=ROLE"
            )
        return _ROLES[known], known in CALL_ROLES


@dataclass(frozen=True)
class ParsedMessage:
    """A message, how much it counts, and its keys that only a template may read."""

    message: Message
    weight: MessageWeight = UNWEIGHTED
    unused: tuple[str, ...] = ()
    is_call: bool = False


def parse_messages(value: Any, column: str, keys: MessageKeys = MessageKeys()) -> list[ParsedMessage]:
    """A list of messages, or the JSON text of one. Raises `BadRow` with the number of the message."""
    value = decoded(value, f"`{column}`")
    if not isinstance(value, list):
        raise BadRow(f"`{column}` must be a list, not {kind(value)}")
    parsed: list[ParsedMessage] = []
    for number, raw in enumerate(value):
        if not isinstance(raw, dict):
            raise BadRow(f"message {number} must be an object with role and content, not {kind(raw)}")
        for single in _single(raw, number, keys):
            parsed.append(_parse_message(single, number, keys))
            if len(parsed) > 1 and (merged := _with_call(parsed[-2], parsed[-1], number)):
                parsed[-2:] = [merged]
    return parsed


def as_context(parsed: ParsedMessage, number: int) -> ParsedMessage:
    """The message as part of a prompt: nothing of it is trained on."""
    if parsed.message["role"] != "assistant":
        return parsed
    if says_more_than_zero(parsed.weight):
        raise BadRow(f"message {number} has a weight above 0, but is part of the prompt, which is context: remove it")
    return replace(parsed, weight=MessageWeight(0.0))


def _single(raw: dict[str, Any], number: int, keys: MessageKeys) -> list[dict[str, Any]]:
    """What holds several messages in one object → each: an exchange (ms-swift; xtuner and Capybara), results of tools in
    parts (Anthropic). Anything else stays."""
    if any(key in raw for key in keys.role):
        return _results(raw) if isinstance(raw.get("content"), list) else [raw]
    for user, assistant in (("human", "assistant"), ("input", "output")):
        if {user, assistant} <= raw.keys():
            if others := raw.keys() - {"system", user, assistant}:
                raise BadRow(
                    f"message {number} is an exchange ({user}, {assistant}) with more keys ({', '.join(sorted(others))}): "
                    "write it as two messages with role and content"
                )
            head = [] if is_empty(raw.get("system")) else [{"role": "system", "content": raw["system"]}]
            return [*head, {"role": "user", "content": raw[user]}, {"role": "assistant", "content": raw[assistant]}]
    return [raw]


def _results(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """A message of the user whose first parts are results of tools → a message of a tool each, and one of what is left."""
    is_result = [isinstance(part, dict) and part.get("type") == RESULT_PART for part in raw["content"]]
    count = is_result.index(False) if False in is_result else len(is_result)
    if not count or raw.get("role") != "user":
        return [raw]
    tools = [
        {**raw, "content": "", **part, "role": "tool", "tool_call_id": part.get("tool_use_id")}
        for part in raw["content"][:count]
    ]
    for tool in tools:
        del tool["type"]
        tool.pop("tool_use_id", None)
    left = raw["content"][count:]
    return [*tools, raw | {"content": left}] if left else tools


def _parse_message(raw: dict[str, Any], number: int, keys: MessageKeys) -> ParsedMessage:
    # a data set's unset columns arrive as null; templates tell an absent key from a present one
    fields = {key: value for key, value in raw.items() if value is not None}
    what = f"message {number}"
    role, is_call = keys.find_role(_take(fields, keys.role, what), number)
    content = _take(fields, keys.content, what)
    if not fields and isinstance(content, str) and not is_call:
        return ParsedMessage({"role": role, "content": content})  # most messages
    for key in MEDIA:
        if not is_empty(fields.get(key)):
            raise BadRow(f"{what} has `{key}`: only texts are supported")
    calls, thinking, joined = [], "", _Parts()
    if is_call:
        calls, content = parse_calls(content, what), ""
    if role == "assistant":
        calls += _take_calls(fields, what)
        thinking = _take(fields, REASONING_KEYS, what) or ""
        if not isinstance(thinking, str):
            raise BadRow(f"the reasoning of {what} must be a string, not {kind(thinking)}")
    elif any(not is_empty(fields.get(key)) for key in ("tool_calls", "function_call")):
        raise BadRow(f"{what} of role {role} calls a tool: only the assistant's may")
    if isinstance(content, list):
        joined = _join_parts(content, what)
        content = joined.text
        if role != "assistant" and (joined.thinking or joined.calls):
            raise BadRow(f"{what} of role {role} has parts of thinking or calls: only the assistant's may")
        if (thinking and joined.thinking) or (calls and joined.calls):
            raise BadRow(f"{what} has thinking or calls both in parts and beside them: keep one")
        thinking, calls = thinking or joined.thinking, calls or joined.calls
    if content is None and (calls or thinking):
        content = ""
    if not isinstance(content, str):
        key = keys.content[0]
        problem = f"must be a string, not {kind(content)}" if any(k in raw for k in keys.content) else "is missing"
        raise BadRow(f"`{key}` of {what} {problem}")
    weight = replace(take_weight(fields, content, joined.spans, what), thinking=joined.thinking_weight)
    if role != "assistant":
        if says_more_than_zero(weight):
            raise BadRow(f"{what} of role {role} has a weight above 0: only the assistant's messages are trained on")
        weight = UNWEIGHTED
    message: Message = {"role": role, "content": content}
    message |= {REASONING_KEYS[0]: thinking} if thinking else {}
    message |= {"tool_calls": calls} if calls else {}
    rest = {key: value for key, value in fields.items() if not (key in _CANONICAL and is_empty(value))}
    unused = (key for key, value in rest.items() if not is_empty(value))
    return ParsedMessage(rest | message, weight, (*unused, *joined.unused), is_call)


def _take(fields: dict[str, Any], keys: tuple[str, ...], what: str) -> Any:
    """Take the value of whichever key is there."""
    found = {key: fields.pop(key) for key in keys if key in fields}
    first = next(iter(found.values()), None)
    if len(found) > 1 and any(value != first for value in found.values()):
        raise BadRow(f"{' and '.join(f'`{key}`' for key in found)} of {what} differ: keep one")
    return first


def _take_calls(fields: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message; `function_call` is OpenAI's older way to write a single one."""
    calls = []
    for key in ("tool_calls", "function_call"):
        if not is_empty(value := fields.pop(key, None)):
            calls.append(parse_calls(value, f"`{key}` of {what}"))
    if len(calls) > 1:
        raise BadRow(f"{what} has both `tool_calls` and `function_call`: keep one")
    return calls[0] if calls else []


def _with_call(before: ParsedMessage, call: ParsedMessage, number: int) -> ParsedMessage | None:
    """One message of the assistant's where a message that is a call follows it: what it said, and the calls."""
    if not call.is_call or before.message["role"] != "assistant" or REASONING_KEYS[0] in call.message:
        return None
    if before.weight.whole != call.weight.whole:
        raise BadRow(
            f"message {number} is a call and part of the assistant's message before it, but has another weight: give both "
            "the same, or weigh the content by `spans`"
        )
    calls = [*before.message.get("tool_calls", []), *call.message["tool_calls"]]
    message = call.message | before.message | {"tool_calls": calls}
    return replace(before, message=message, unused=(*before.unused, *call.unused))


@dataclass
class _Parts:
    """A content that came in parts."""

    text: str = ""
    thinking: str = ""
    thinking_weight: float | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    spans: list[WeightedSpan] = field(default_factory=list)
    """Of `text`."""
    unused: list[str] = field(default_factory=list)
    """Keys that nothing reads, as `content.KEY`."""


def _join_parts(parts: list[Any], what: str) -> _Parts:
    """Thinking, then texts (with nothing between them, as chat templates that know parts do), then calls."""
    joined = _Parts()
    for index, raw in enumerate(parts):
        place = f"part {index} of {what}"
        part = {"text": raw} if isinstance(raw, str) else raw
        if not isinstance(part, dict):
            raise BadRow(f"{place} must be an object with type and text, not {kind(part)}")
        part = {key: value for key, value in part.items() if value is not None}
        name = part.pop("type", "text")
        weight = take_whole(part, place)
        if name == USE_PART:
            call = {"id": part.pop("id", None), "name": part.pop("name", None), "arguments": part.pop("input", None)}
            name, content = CALL_PARTS[0], call
        else:
            content = _take(part, PART_KEYS, place)
        joined.unused += [f"content.{key}" for key, value in part.items() if not is_empty(value)]
        if name in REASONING_PARTS and isinstance(content, list):  # Mistral's thinking holds parts of text
            inner = _join_parts(content, place)
            weight = next((weight for *_, weight in inner.spans), weight)
            content = inner.text
        if name not in (*TEXT_PARTS, *REASONING_PARTS) and weight is not None:
            raise BadRow(f"{place} is neither text nor thinking, but has a weight: weigh the whole message")
        if name in CALL_PARTS:
            joined.calls += parse_calls(content, place)
        elif name not in (*TEXT_PARTS, *REASONING_PARTS):
            raise BadRow(f"{place} is of type {name!r}: only text, thinking, tool_call and tool_use are supported")
        elif not isinstance(content, str):
            raise BadRow(f"`text` of {place} must be a string, not {kind(content)}")
        elif joined.calls or (joined.text and name in REASONING_PARTS):
            raise BadRow(f"{place} is out of order: templates write thinking, then text, then calls")
        elif name in REASONING_PARTS:
            if joined.thinking and joined.thinking_weight != weight:
                raise BadRow(f"{place} has another weight than the thinking before it: give all thinking the same")
            joined.thinking, joined.thinking_weight = joined.thinking + content, weight
        else:
            start, joined.text = len(joined.text), joined.text + content
            joined.spans += [(start, len(joined.text), weight)] if weight is not None and content else []
    return joined


assert tuple(ROLE_NAMES) == ROLES
