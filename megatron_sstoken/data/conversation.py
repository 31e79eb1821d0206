"""A conversation as the chat template takes it, and how much of it is trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]
Segment = tuple[int, int, float]
"""Characters [start, stop) and their weight, above 0."""

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's thinking: DeepSeek and Qwen, vLLM, gpt-oss. Rows may have any; a `Conversation` has the first."""


def printable(text: str) -> str:
    """The text, with half surrogate pairs (which no stream takes) written out as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class BadRow(ValueError):
    """One row cannot be prepared; the message is the reason. Other rows may be fine."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


def check_characters(text: str) -> None:
    """Raise `BadRow` for half surrogate pairs, which JSON can write and UTF-8 cannot."""
    if text.isascii():  # next to no time, and most texts are
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{error.object[error.start]!r} is half a surrogate pair, not a character") from error


def check_contents(messages: Iterable[Message]) -> None:
    """`check_characters` of the contents of messages."""
    for message in messages:
        check_characters(message["content"])


@dataclass(frozen=True)
class MessageWeight:
    """How much what an assistant message says counts: 1 as usual, 0 is context, and anything in between or above."""

    whole: float | None = None
    """Of the whole message, its tool calls and end of turn included; None: the row says nothing."""
    spans: tuple[tuple[int, int, float], ...] = ()
    """(start, stop, weight) of characters of `content`, ascending, not overlapping; they win over `whole`."""
    thinking: float | None = None
    """Of the thinking beside `content`; wins over `whole`."""


@dataclass(frozen=True)
class Conversation:
    """One row, whatever form it had."""

    messages: list[Message]
    """What the template sees. `role` is one of `ROLES`, `content` a string; more keys (tool_calls, reasoning_content,
    name …). The arguments of calls are objects; `TemplateStyle.apply` writes them as text where the template wants
    that. Keys whose value is null are left out."""
    weights: tuple[MessageWeight, ...] = ()
    """One for each message, or none at all: the row says nothing."""
    tools: list[dict[str, Any]] | None = None
    """Tool schemas, as the template takes them."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the row itself tells the template (`chat_template_kwargs`)."""
    source: str | None = None
    """Label of the row (its column `source`), else None."""
    unused: tuple[str, ...] = ()
    """Columns (`id`), keys of messages (`messages.id`) and of their parts (`messages.content.id`) that are not read here.
    The template may read those of messages, and names of `chat_template_kwargs`: `template_style.really_unused`."""
    notes: tuple[str, ...] = ()
    """What the summary should tell of the row, with the number of rows."""

    def weight_of(self, index: int) -> MessageWeight:
        """Weight of message `index`."""
        return self.weights[index] if self.weights else MessageWeight()
