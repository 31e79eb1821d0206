"""Where the assistant's messages begin and end in a rendered conversation.

A response is what the model has to write after the generation prompt: the message and the token that ends its turn. A
template with generation marks says so itself. Of another one, the generation prompt and the text after a message are
rendered for conversations that end there, and looked for in the whole; what is not found word for word is refused.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from megatron_sstoken.data.conversation import BadRow, Message, Span
from megatron_sstoken.data.text.skeleton import THINK_TAGS, Layout, Place
from megatron_sstoken.data.tokenizer import RenderedChat, TextTokenizer

REMEDY = "use a --chat_template with {% generation %} marks around what the assistant says"

_OPEN = "|".join(re.escape(start) for start, _ in THINK_TAGS)
_CLOSE = "|".join(re.escape(stop) for _, stop in THINK_TAGS)
_OPENER_AT_END = re.compile(rf"(?:{_OPEN})\s*(?:(?:{_CLOSE})\s*)?\Z")


class Render(Protocol):
    """The chat template with a row's tools and arguments."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class Response:
    """Characters [start, stop) of the text that an assistant's message is, end of turn included; often one span."""

    message: int
    spans: tuple[Span, ...]
    ended: bool
    """Whether a special token ends it."""


def find_end(tokenizer: TextTokenizer, text: str, start: int, stop: int) -> int | None:
    """Where the template's text [start, stop) after a message ends the turn: after the first token that is known to end
    turns, else after the last special token; None without any."""
    if known := tokenizer.end_pattern.search(text, start, stop):
        return known.end()
    return max((found.end() for found in tokenizer.specials.pattern.finditer(text, start, stop)), default=None)


# A template with marks


def marked_responses(tokenizer: TextTokenizer, chat: RenderedChat, layout: Layout, header: str) -> list[Response]:
    """Responses of a template with generation marks, each with the end of turn that follows it."""
    if all(start == stop for start, stop in chat.spans):
        raise BadRow(f"the template's generation marks are empty for this conversation: {REMEDY}")
    roles = [message["role"] for message in layout.marker.messages]
    found: dict[int, list[Span]] = {}
    ended: dict[int, bool] = {}
    starts = [place.start for place in layout.places]
    turns = [index for index, role in enumerate(roles) if role == "assistant"]
    for number, (start, stop) in enumerate(chat.spans):
        first = bisect_left(starts, start)
        inside = layout.places[first : bisect_left(starts, stop)]
        before = layout.places[first - 1].piece.message if first else 0
        owner = turns[number] if len(turns) == len(chat.spans) else _owner(inside, before, roles)
        after = find_end(tokenizer, chat.text, inside[-1].stop if inside else start, stop)
        if after is None and (next_to := tokenizer.end_pattern.match(chat.text, stop)):
            after = next_to.end()
        start = _without_header(chat.text, start, inside[0].start if inside else stop, stop, header)
        if start < (end := stop if after is None else after):
            found.setdefault(owner, []).append((start, end))
            ended[owner] = after is not None
    return [Response(message, tuple(spans), ended[message]) for message, spans in found.items()]


def _owner(inside: Sequence[Place], before: int, roles: Sequence[str]) -> int:
    """The assistant's message that a marked span is of: what is said in it, or the next after what stands before it."""
    following = range(inside[0].piece.message if inside else before, len(roles))
    return next((index for index in following if roles[index] == "assistant"), before)


def _without_header(text: str, start: int, said: int, stop: int, header: str) -> int:
    """Some marks, such as SmolLM3's, hold the header, before what is said; the model does not write it."""
    begins = start + len(text[start:stop]) - len(text[start:stop].lstrip())
    after = _Header.of(header).after(text, begins) if header.strip() else None
    return start if after is None or said < min(after, stop) else min(after, stop)


# A template without


@dataclass(frozen=True)
class _Header:
    """What stands before a response, and what of thinking the generation prompt has written for the model after it."""

    text: str
    opener: str = ""

    @classmethod
    def of(cls, prompt: str) -> "_Header":
        found = _OPENER_AT_END.search(prompt)
        return cls(prompt[: found.start()], found[0]) if found else cls(prompt)

    def after(self, text: str, position: int) -> int | None:
        """Where it ends in a text if it stands at `position`."""
        if not text.startswith(self.text, position):
            return None
        position += len(self.text)
        return position + len(self.opener) if text.startswith(self.opener, position) else position


class UnmarkedResponses:
    """Finds the responses of one conversation in its skeleton.

    What stands before and after messages is rendered once for messages of one shape; at the others it is only compared.
    So the work grows with the conversation, not with its square.
    """

    def __init__(self, tokenizer: TextTokenizer, layout: Layout, render: Render, prompt: str):
        assert layout.skeleton is not None
        self._tokenizer, self._layout, self._render, self._prompt = tokenizer, layout, render, prompt
        self._text = layout.skeleton
        self._messages = layout.marker.marked
        self._headers: dict[Any, _Header] = {}
        self._tails: dict[Any, re.Pattern[str]] = {}

    def find(self) -> list[Response]:
        """All responses, in order."""
        turns = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        return [self._response(turn) for turn in turns]

    @cached_property
    def _last_marks(self) -> dict[int, int]:
        """Message → where the last of its marks ends in the skeleton."""
        return {place.piece.message: place.mark_stop for place in self._layout.places}

    @cached_property
    def _mark_stops(self) -> dict[str, list[int]]:
        stops: dict[str, list[int]] = {}
        for place in self._layout.places:
            stops.setdefault(self._text[place.mark_start : place.mark_stop], []).append(place.mark_stop)
        return stops

    def _response(self, turn: int) -> Response:
        start = self._start(turn)
        stop, ended = self._stop(turn, start)
        if stop <= start:
            raise BadRow(f"the template writes nothing of the assistant's message {turn}: {REMEDY}")
        return Response(turn, ((self._layout.to_text(start), self._layout.to_text(stop)),), ended)

    def _start(self, turn: int) -> int:
        shape = _shape(self._messages[turn - 1]) if turn else None
        anchor = self._last_marks.get(turn - 1)
        if anchor is not None and shape in self._headers:
            found = self._headers[shape].after(self._text, anchor)
            if found is not None:
                return found
        try:
            prefix = self._render(self._messages[:turn], True)
        except BadRow:  # templates may want a user's message, or any
            return self._start_by_probe(turn, 0, "")
        mark = self._layout.marker.last_mark(prefix)
        place = 0 if mark is None else self._same_mark(prefix, mark)
        if place is None:
            raise self._untold(turn, "begins")
        prompt = prefix[mark.end() :] if mark else prefix
        if not self._prompt or not prompt.endswith(self._prompt):
            return self._start_by_probe(turn, place, prompt)
        header = _Header.of(prompt)
        start = header.after(self._text, place)
        if start is None:  # templates may begin a conversation, or end one, with something of its own
            return self._start_by_probe(turn, place, "")
        if place == anchor:
            self._headers[shape] = header
        return start

    def _same_mark(self, prefix: str, mark: re.Match[str]) -> int | None:
        """Where the mark of a prefix ends in the skeleton, which may have it several times."""
        number = prefix.count(mark[0]) - 1
        stops = self._mark_stops.get(mark[0], [])
        return stops[number] if number < len(stops) else None

    def _start_by_probe(self, turn: int, place: int, prompt: str) -> int:
        """Where no generation prompt says it: what the template writes before some other text in this message's place is
        the header, but not the spaces that some write before every answer, nor a think block."""
        probe = self._layout.marker.probe
        text = self._render([*self._messages[:turn], {"role": "assistant", "content": probe}])
        content = text.rfind(probe)
        mark = self._layout.marker.last_mark(text[:content])
        written = text[mark.end() if mark else 0 : content]
        if content < 0 or not written.startswith(prompt):
            raise self._untold(turn, "begins")
        known = _Header.of(self._prompt).text
        if known and known in written:
            header = _Header(written[: written.rindex(known) + len(known)])
        else:
            header = _Header(_Header.of(written).text)
            if not header.text[len(prompt) :].strip():
                header = _Header(prompt)
        start = header.after(self._text, place)
        if start is None:
            raise self._untold(turn, "begins")
        if turn and place == self._last_marks.get(turn - 1):
            self._headers[_shape(self._messages[turn - 1])] = header
        return start

    def _stop(self, turn: int, start: int) -> tuple[int, bool]:
        shape = _shape(self._messages[turn])
        after = self._last_marks.get(turn)
        if after is None:
            return self._stop_of_silence(turn, start)
        known = self._tails.get(shape)
        if known and (found := known.match(self._text, after)):
            tail, common = found[0], found.end()
        else:
            tail = self._tail(turn)
            common = after + len(os.path.commonprefix([tail, self._text[after : after + len(tail)]]))
            self._tails[shape] = _but_for_values(tail)
        end = find_end(self._tokenizer, self._text, after, common)
        if end is None and tail and common == after:
            raise self._untold(turn, "ends")
        return (common, False) if end is None else (end, True)

    def _stop_of_silence(self, turn: int, start: int) -> tuple[int, bool]:
        """Of a message that has no mark: it says nothing, spaces, or numbers. Its tail is that of another text."""
        probe = self._layout.marker.probe
        text = self._render([*self._messages[:turn], self._messages[turn] | {"content": probe}])
        content = text.rfind(probe)
        tail = text[content + len(probe) :]
        end = find_end(self._tokenizer, tail, 0, len(tail))
        tail = tail if end is None else tail[:end]
        limit = next((place.mark_start for place in self._layout.places if place.mark_start >= start), len(self._text))
        found = self._text.find(tail, start, limit)
        if content < 0 or found < 0:
            raise self._untold(turn, "ends")
        return found + len(tail), end is not None

    def _tail(self, turn: int) -> str:
        """What the template writes after message `turn` if the conversation ends there."""
        marker = self._layout.marker
        last = turn == len(self._messages) - 1
        try:
            text = self._text if last else self._render(self._messages[: turn + 1])
        except BadRow as error:
            raise self._untold(turn, "ends") from error
        mark = marker.last_mark(text)
        if mark is None or marker.pieces[int(mark[1])].message != turn:
            raise self._untold(turn, "ends")
        return text[mark.end() :]

    def _untold(self, turn: int, what: str) -> BadRow:
        return BadRow(f"it cannot be told where the assistant's message {turn} {what} in the template's text: {REMEDY}")


def _but_for_values(text: str) -> re.Pattern[str]:
    """Matches the text also with other values in place of the numbers and booleans that arguments may hold."""
    value = r"(?:-?\d[\d.eE+-]*|true|false|null)"
    return re.compile(value.join(map(re.escape, re.split(value, text))))


def _shape(message: Message) -> Any:
    """What templates decide by: role, keys, and which of them hold something."""
    calls = message.get("tool_calls")
    count = len(calls) if isinstance(calls, list) else 0
    return message["role"], tuple(sorted(key for key, value in message.items() if value)), count


def prefix_responses(
    tokenizer: TextTokenizer, layout: Layout, messages: Sequence[Message], render: Render, prompt: str
) -> list[Response]:
    """Responses of a conversation whose skeleton is not known: every one by rendering the conversation up to it."""
    assert layout.skeleton is None
    return [
        _prefix_response(tokenizer, layout, messages, turn, render, prompt)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _prefix_response(
    tokenizer: TextTokenizer, layout: Layout, messages: Sequence[Message], turn: int, render: Render, prompt: str
) -> Response:
    untold = BadRow(
        f"the tokens of the assistant's message {turn} cannot be told exactly: the conversation rendered up to it is "
        f"not how the whole begins: {REMEDY}"
    )
    header = _Header.of(render(messages[:turn], True))
    start = header.after(layout.text, 0)
    if start is None:
        raise untold
    places = [place for place in layout.places if place.piece.message == turn and place.start >= start]
    if not prompt and places and (before := layout.text[start : places[0].start]).strip():
        start += len(_Header.of(before).text)
    until = layout.text if turn == len(messages) - 1 else render(messages[: turn + 1])
    if not layout.text.startswith(until):
        raise untold
    after = places[-1].stop if places else start
    end = find_end(tokenizer, layout.text, after, len(until))
    return Response(turn, ((start, len(until) if end is None else end),), end is not None)
