"""Where a chat template puts what a conversation says.

The conversation is rendered once more with a mark in place of each text. What stands between the marks is the template's
own, and the same as in the real text; that is checked to the last character.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sstoken.data.conversation import REASONING_KEYS, BadRow, Message
from megatron_sstoken.data.text.finder import Finder

THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
"""What families write around thinking."""

_CLOSED = re.compile("|".join(re.escape(close) for _, close in THINK_TAGS[:-1]))
MARKUP = Finder(
    re.compile(
        "|".join(re.escape(tag) for tags in THINK_TAGS[:-1] for tag in tags)
        + r"|</?tool_(?:call|response)>|/(?:no_)?think\b|/system_override\b"
    ),
    hints={"<": ("think", "reasoning>", "tool_"), "[": ("THINK]",), "/": ("think", "/system_override")},
)
"""What templates look for in a content: it stays, so that they decide as they do for the real one."""

Part = Literal["content", "reasoning", "name", "argument"]


@dataclass(frozen=True)
class Piece:
    """A run of characters of one text of a message, without markup and without the whitespace at its ends."""

    message: int
    part: Part
    text: str
    content_start: int | None = None
    """Where it starts in `content`; None if it is not of `content`."""
    call: int = 0
    """Which of the message's tool calls it is of."""


@dataclass(frozen=True)
class Place:
    """A piece in the rendered text: characters [start, stop), there and where its mark stands in the skeleton."""

    piece: Piece
    start: int
    stop: int
    mark_start: int = 0
    mark_stop: int = 0

    @property
    def exact(self) -> bool:
        """Whether the template wrote it as it is, nothing escaped."""
        return self.stop - self.start == len(self.piece.text)


@dataclass
class Marker:
    """Puts marks in place of the texts of messages, and finds them again."""

    messages: Sequence[Message]
    taken: str
    """No mark occurs in this text."""
    pieces: list[Piece] = field(default_factory=list)
    marked: list[Message] = field(default_factory=list)
    """The messages with marks in place of texts."""

    def __post_init__(self) -> None:
        self._name = "Xq"
        while self._name in self.taken:
            self._name += "q"
        self.pattern = re.compile(self._name + r"(\d+)Z")
        self.probe = f"{self._name}Z"  # a text that no piece has
        self.marked = [self._mark_message(index, message) for index, message in enumerate(self.messages)]

    def _mark_message(self, index: int, message: Message) -> Message:
        marked = dict(message)
        if isinstance(content := message.get("content"), str):
            marked["content"] = self._mark(content, index, "content", content=True)
        reasoning = next((key for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
        if reasoning is not None:
            mark = self._mark(message[reasoning], index, "reasoning")
            marked |= {key: mark for key in REASONING_KEYS if message.get(key) == message[reasoning]}
        if isinstance(calls := message.get("tool_calls"), list):
            marked["tool_calls"] = [self._mark_call(call, index, number) for number, call in enumerate(calls)]
        return marked

    def _mark_call(self, call: Any, index: int, number: int) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": self._mark_call(call["function"], index, number)}
        marked = dict(call)
        if isinstance(name := call.get("name"), str):
            marked["name"] = self._mark(name, index, "name", call=number)
        if "arguments" in call:
            marked["arguments"] = self._mark_value(call["arguments"], index, number)
        return marked

    def _mark_value(self, value: Any, index: int, number: int) -> Any:
        if isinstance(value, str):
            return self._mark(value, index, "argument", call=number)
        if isinstance(value, dict):
            return {key: self._mark_value(one, index, number) for key, one in value.items()}
        return [self._mark_value(one, index, number) for one in value] if isinstance(value, list) else value

    def _mark(self, text: str, index: int, part: Part, content: bool = False, call: int = 0) -> str:
        closed = _CLOSED.search(text) if content and self.messages[index]["role"] == "assistant" else None
        marked, position = "", 0
        for start, stop in runs(text):
            kind: Part = "reasoning" if closed and stop <= closed.start() else part
            marked += f"{text[position:start]}{self._name}{len(self.pieces)}Z"
            self.pieces.append(Piece(index, kind, text[start:stop], start if content else None, call))
            position = stop
        return marked + text[position:]

    def last_mark(self, text: str) -> re.Match[str] | None:
        """The last mark in a text."""
        last = text.rfind(self._name)
        return None if last < 0 else self.pattern.match(text, last)


def runs(text: str) -> Iterator[tuple[int, int]]:
    """Runs of characters of a text, [start, stop), without markup and without the whitespace at their ends."""
    position = 0
    for start, stop in [*(found.span() for found in MARKUP.pattern.finditer(text)), (len(text), len(text))]:
        run = text[position:start]
        if stripped := run.strip():
            first = position + run.index(stripped)
            yield first, first + len(stripped)
        position = stop


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and where each of its pieces is."""

    text: str
    places: list[Place]
    """In the order of the text."""
    skeleton: str | None
    """The text with marks for pieces; None: the template does something else with other texts, and pieces were looked for
    in the text one after the other."""
    marker: Marker

    def to_text(self, position: int) -> int:
        """A position of the skeleton outside of marks → the text's."""
        low, high = 0, len(self.places)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.places[middle].mark_stop <= position else (low, middle)
        return position + (self.places[low - 1].stop - self.places[low - 1].mark_stop if low else 0)

    @property
    def own_text(self) -> str:
        """What the template itself wrote, as far as that is known."""
        return self.text if self.skeleton is None else self.skeleton


def lay_out(messages: Sequence[Message], text: str, render: Callable[[list[Message]], str]) -> Layout:
    """Find what `messages` say in `text`, which the template made of them; `render` renders others like it."""
    marker = Marker(messages, text)
    try:
        skeleton = render(marker.marked)
    except BadRow:  # it wants certain contents
        return Layout(text, _search(text, marker.pieces), None, marker)
    places = _fill(skeleton, text, marker)
    if places is None:
        return Layout(text, _search(text, marker.pieces), None, marker)
    return Layout(text, places, skeleton, marker)


def _forms(text: str) -> tuple[str, ...]:
    """How templates write a text: as it is, in JSON, in JSON inside of JSON."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return (text,) if escaped == text and text.isascii() else (
        text, escaped, json.dumps(text)[1:-1], json.dumps(escaped, ensure_ascii=False)[1:-1],
    )  # fmt: skip


def _fill(skeleton: str, text: str, marker: Marker) -> list[Place] | None:
    """Places of the marks' pieces; None if the skeleton with the pieces in place of marks is not the text."""
    places: list[Place] = []
    position = last = 0
    for mark in marker.pattern.finditer(skeleton):
        literal = skeleton[last : mark.start()]
        if not text.startswith(literal, position) or int(mark[1]) >= len(marker.pieces):
            return None
        start, piece = position + len(literal), marker.pieces[int(mark[1])]
        written = next((form for form in _forms(piece.text) if text.startswith(form, start)), None)
        if written is None:
            return None
        position, last = start + len(written), mark.end()
        places.append(Place(piece, start, position, *mark.span()))
    return places if text[position:] == skeleton[last:] else None


def _search(text: str, pieces: Sequence[Piece]) -> list[Place]:
    """Places of pieces where they first occur after the one before, else anywhere."""
    places, position = [], 0
    for piece in pieces:
        for form in _forms(piece.text):
            start = text.find(form, position)
            start = text.find(form) if start < 0 else start
            if start >= 0:
                places.append(Place(piece, start, start + len(form)))
                position = max(position, start + len(form))
                break
    return sorted(places, key=lambda place: place.start)
