"""What a chat template expects of messages, where templates differ: found by rendering probes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from jinja2 import meta

from megatron_sstoken.data.conversation import BadRow, Message
from megatron_sstoken.data.rows.tool_calls import with_text_arguments

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
    without = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)  # jinja2 alone does not know marks
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(without)
        return frozenset(meta.find_undeclared_variables(tree))
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}: correct the template") from error


def _writes_call(text: str) -> bool:
    """Whether the arguments of the probe are written, and neither as Python's text of them nor encoded twice."""
    wrong = (f"'{_KEY}'", f'\\"{_KEY}')
    return _KEY in text and _VALUE in text and not any(form in text for form in wrong)
