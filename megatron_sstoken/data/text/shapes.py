"""What a template writes around the texts of a conversation, found once for all conversations of one shape.

Nothing is taken on trust: a conversation is rendered, and has to be the known literals with its texts between them, to the
last character and with marks at the same places. What is remembered then is what `rendering` would find anew. All else
goes that way. Only where the template's syntax says that it cannot be otherwise (`verbatim`) the text is written without it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from megatron_sstoken.data.conversation import Conversation, Message, Segment, Span
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.text.finder import Finder
from megatron_sstoken.data.text.skeleton import MARKUP, Layout, runs

MOST_SHAPES = 4096
"""That are remembered of one template."""

Border = tuple[int, int]
"""Which literal, and how many characters after its beginning."""


@dataclass(frozen=True)
class Shape:
    """A text as literals with runs of characters of messages between them, and borders, all of which lie in literals."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    """Which run follows each literal but the last."""
    marks: tuple[tuple[Border, Border], ...]
    """Spans of generation marks."""
    segments: tuple[tuple[Border, Border, float], ...]
    """What is trained, and its weights."""
    notes: tuple[str, ...]
    trims: tuple[bool, ...] | None = None
    """Whether the template trims each run, where it is known that this is all it does to contents."""

    @classmethod
    def of(
        cls,
        layout: Layout,
        pieces: Sequence[str],
        marks: Sequence[Span],
        segments: Sequence[Segment],
        notes: Sequence[str],
    ) -> "Shape | None":
        """The shape of a rendered conversation; None where it does not hold everything, as it is, between literals."""
        numbers = {id(piece): number for number, piece in enumerate(layout.marker.pieces)}
        order = tuple(numbers[id(place.piece)] for place in layout.places)
        exact = all(place.exact for place in layout.places)
        if layout.skeleton is None or not exact or {*order} != {*numbers.values()} or len(pieces) != len(numbers):
            return None
        spans = _with_spaces(layout, [pieces[number] for number in order])
        starts, stops = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(layout.text)]

        def border(position: int) -> Border:
            for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                if start <= position <= stop:
                    return number, position - start
            raise LookupError("inside of a run")

        try:
            return cls(
                tuple(layout.text[start:stop] for start, stop in zip(starts, stops, strict=True)),
                order,
                tuple((border(start), border(stop)) for start, stop in marks),
                tuple((border(start), border(stop), weight) for start, stop, weight in segments),
                tuple(notes),
            )
        except LookupError:
            return None

    def write(self, pieces: Sequence[str]) -> tuple[str, list[Segment]] | None:
        """The text with these runs and its segments; None where the template has to be asked."""
        if self.trims is None:
            return None
        runs_of_text = pieces if self._in_order else [pieces[number] for number in self.order]
        if any(self.trims):
            runs_of_text = [run.strip() if trims else run for run, trims in zip(runs_of_text, self.trims, strict=True)]
        parts = self._parts(runs_of_text)
        return "".join(parts), self._segments(_starts(parts))

    def seeing_trims(self, messages: Sequence[Message], render: Callable[[list[Message]], str]) -> "Shape":
        """The shape with `trims`, seen with whitespace around every content of `messages`, which are of it.

        `render` is a template that is `verbatim.is_verbatim`. What goes otherwise than expected leaves the shape as it is.
        """
        padded = [message | {"content": f" {message['content']} "} for message in messages]
        text, pieces = render(padded), [piece for message in padded for piece in pieces_of(message["content"])[1]]
        position, trims = 0, []
        for literal, number in zip(self.literals, self.order, strict=False):
            position += len(literal)
            trims.append(not text.startswith(pieces[number], position))
            position += len(pieces[number].strip() if trims[-1] else pieces[number])
        seen = replace(self, trims=tuple(trims))
        written = seen.write(pieces)
        return seen if written is not None and written[0] == text else self

    def trained(self, text: str, pieces: Sequence[str], marks: Sequence[Span]) -> list[Segment] | None:
        """The segments of a text with these runs, as characters; None if it is not of this shape."""
        parts = self._parts(pieces[number] for number in self.order)
        if "".join(parts) != text:
            parts = self._parts(pieces[number].strip() for number in self.order)  # as templates write them that trim
            if "".join(parts) != text:
                return None
        at = _starts(parts)
        if [(at[left] + start, at[right] + stop) for (left, start), (right, stop) in self.marks] != marks:
            return None
        return self._segments(at)

    def _parts(self, runs_of_text: Iterable[str]) -> list[str]:
        """Literals, and the runs between them."""
        parts = self._spaced_literals.copy()
        parts[1::2] = runs_of_text
        return parts

    @cached_property
    def _spaced_literals(self) -> list[str]:
        return [part for literal in self.literals for part in (literal, "")][:-1]

    @cached_property
    def _in_order(self) -> bool:
        """Whether the template writes all runs once, one after another."""
        return self.order == (*range(len(self.order)),)

    def _segments(self, at: Sequence[int]) -> list[Segment]:
        return [(at[left] + start, at[right] + stop, weight) for (left, start), (right, stop), weight in self.segments]


def _starts(parts: Iterable[str]) -> list[int]:
    """Where each literal starts in the text: every second part."""
    return [*accumulate(map(len, parts), initial=0)][::2]


def _with_spaces(layout: Layout, pieces: Sequence[str]) -> list[Span]:
    """Where the pieces are in the text, with the spaces at their ends if the template wrote them."""
    spans: list[Span] = []
    for place, piece in zip(layout.places, pieces, strict=True):
        start = place.start - piece.index(place.piece.text)
        if start < (spans[-1][1] if spans else 0) or not layout.text.startswith(piece, start):
            return [(place.start, place.stop) for place in layout.places]
        spans.append((start, start + len(piece)))
    return spans


def shape_of(conversation: Conversation, recipe: Recipe, specials: Finder) -> tuple[Any, list[str]] | None:
    """What the shape of a conversation depends on, and its runs of characters; None if it is not of the simple kind.

    That is: roles and contents only, no text of a special token, no weights of spans or thinking. A run that is a whole
    content has the spaces at its ends.
    """
    if conversation.tools is not None or conversation.template_arguments or recipe.thinking_weight != 1.0:
        return None
    weights = conversation.weights
    if weights and any(weight.spans or weight.thinking is not None for weight in weights):
        return None
    messages = conversation.messages
    contents = [message["content"] for message in messages]
    together = "".join(contents)
    if any([len(message) != 2 for message in messages]):
        return None
    if specials.is_in(together) and any(map(specials.is_in, contents)):
        return None
    shape, pieces = [message["role"] for message in messages], contents
    if MARKUP.may_be_in(together) or not all(contents) or any(map(str.isspace, contents)):
        split = [pieces_of(content) for content in contents]
        shape = [text for role, (around, _) in zip(shape, split, strict=True) for text in (role, *around)]
        pieces = [run for _, within in split for run in within]
    arguments = str(recipe.template_arguments)
    return (tuple(shape), weights, recipe.turns, arguments), pieces


def pieces_of(content: str) -> tuple[list[str], list[str]]:
    """A content as what belongs to the shape, markup and the whitespace around it, and its runs of characters."""
    if content and not content.isspace() and not MARKUP.is_in(content):
        return [], [content]
    around, within, position = [], [], 0
    for start, stop in runs(content):
        around.append(content[position:start])
        within.append(content[start:stop])
        position = stop
    return [*around, content[position:]], within
