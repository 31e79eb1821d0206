"""What a chat template expects of messages, and what it reads: found by rendering probes, and in its text."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import meta

from megatron_sstoken.data.conversation import BadRow, Message
from megatron_sstoken.data.text.marks import parse_template

_KEY, _VALUE = "probed_argument", "probed value"
_CALL = {"type": "function", "function": {"name": "probed_function", "arguments": {_KEY: _VALUE}}, "id": "probe0001"}
_QUESTION = {"role": "user", "content": "a question"}
_RESULT = {"role": "tool", "content": "a result", "name": "probed_function", "tool_call_id": "probe0001"}
_ANSWER = {"role": "assistant", "content": "an answer"}


@dataclass(frozen=True)
class TemplateStyle:
    """How a chat template wants messages that mean the same. The default suits most."""

    text_arguments: bool = False
    """It writes the arguments of calls as they are, so they must be JSON text; others apply `tojson`."""
    null_content: bool = False
    """It writes the calls of a message only where `content` is null (DeepSeek-R1)."""

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages of a `Conversation` as the template wants them."""
        styled = with_text_arguments(messages) if self.text_arguments else list(messages)
        if not self.null_content:
            return styled
        return [
            message | {"content": None} if message.get("tool_calls") and not message["content"] else message
            for message in styled
        ]


def find_style(render: Callable[[list[Message]], str]) -> TemplateStyle:
    """What the template behind `render` wants. Renders at most four short conversations: once a template.

    `render` raises `BadRow` where the template refuses. A template that writes no form right (it knows no tools) has
    the default style.
    """

    def text(messages: list[Message]) -> str:
        try:
            return render(messages)
        except BadRow:
            return ""

    styles = [
        TemplateStyle(text_arguments, null_content)
        for null_content in (False, True)
        for text_arguments in (False, True)
    ]
    call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    conversation = [_QUESTION, call, _RESULT, _ANSWER]
    return next((style for style in styles if _writes_call(text(style.apply(conversation)))), TemplateStyle())


@lru_cache(maxsize=16)
def names_read(template: str) -> frozenset[str]:
    """Names that a chat template takes from outside: of the conversation, special tokens, and arguments of its own."""
    return frozenset(meta.find_undeclared_variables(parse_template(template)))


def really_unused(unused: Iterable[str], template: str | None) -> tuple[str, ...]:
    """Of `Conversation.unused`, what the chat template does not read either.

    A key of messages counts as read where the template's text takes it from something that is not a tool or a call:
    `message.name`, `message["name"]`, `m.get("name")`; one of `chat_template_kwargs` where it is a name of the template.
    """

    def is_read(key: str) -> bool:
        name = re.escape(key)
        takes = rf"(\w+)(?:\[[^\]'\"]*\])?\s*(?:\.\s*{name}\b|\[\s*['\"]{name}['\"]\s*\]|\.get\(\s*['\"]{name}['\"])"
        return any(not re.search("tool|func|call|param", base) for base in re.findall(takes, template or ""))

    def is_used(name: str) -> bool:
        owner, _, key = name.partition(".")
        return (
            is_read(key)
            if owner == "messages"
            else owner == "chat_template_kwargs" and key in names_read(template or "")
        )

    return tuple(name for name in unused if not is_used(name))


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of calls as JSON text, for templates that write them as they are."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)  # as `tojson` of transformers
        return call | {"function": call["function"] | {"arguments": text}}

    return [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _writes_call(text: str) -> bool:
    """Whether the arguments of the probe are written, and neither as Python's text of them nor encoded twice."""
    wrong = (f"'{_KEY}'", f'\\"{_KEY}')
    return _KEY in text and _VALUE in text and not any(form in text for form in wrong)
