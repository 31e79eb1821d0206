"""Tokens of borders by the special tokens before them, for texts that are encoded without positions, which is faster.

Special tokens split a text, and each part is encoded alone: what follows one begins a token. For a border some
characters after it, such as a header's end, these few are encoded alone, and looked for in the tokens of the whole.
Where any of this does not hold, positions say where borders are.
"""

import re
from dataclasses import dataclass, field

from megatron_sstoken.data.conversation import Span
from megatron_sstoken.data.text.shapes import Border, Shape
from megatron_sstoken.data.tokenizer import TextTokenizer

Segment = tuple[int, int, float]
_NEXT = re.compile(r"\s*\S?")
"""What may be in one token with the end of a header, and what keeps its last space from it."""
_MOST_HEADS = 4096


@dataclass(frozen=True)
class _Anchor:
    """A border: after which of the text's special tokens, the text between, and its tokens."""

    number: int
    header: str
    ids: list[int]


@dataclass(frozen=True)
class Anchors:
    """Of all conversations of one shape."""

    tokenizer: TextTokenizer
    specials: list[int]
    """The special tokens of the text."""
    borders: list[tuple[_Anchor, _Anchor]]
    """Of the segments."""
    equal_weights: bool
    """Whether all that is trained has weight 1."""
    heads: dict[tuple[str, int], tuple[list[int], Span]] = field(default_factory=dict)
    """Headers with what follows them."""

    @classmethod
    def of(cls, shape: Shape, tokenizer: TextTokenizer) -> "Anchors | None":
        """None where special tokens do not say where the shape's borders are."""
        if not tokenizer.splits_at_specials:
            return None
        found = [list(tokenizer.specials.pattern.finditer(literal)) for literal in shape.literals]
        borders = []
        for start, stop, _ in shape.segments:
            pair = [_anchor(tokenizer, shape, border, found) for border in (start, stop)]
            if pair[0] is None or pair[1] is None:
                return None
            borders.append((pair[0], pair[1]))
        texts = [one[0] for matches in found for one in matches]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, positions=False)]
        if any(len(one) != 1 for one in ids):
            return None
        return cls(tokenizer, [one for (one,) in ids], borders, all(weight == 1.0 for *_, weight in shape.segments))

    def find(
        self, text: str, segments: list[Segment], ids: list[int], places: list[int]
    ) -> list[tuple[int, int]] | None:
        """The segments as tokens [start, stop); None where this text is not like the others.

        `places`: those of the special tokens among `ids`, which are `specials`.
        """
        found = []
        for (first, last), (start, stop, _) in zip(self.borders, segments, strict=True):
            left = self._token(first, places, ids, text, start, 0) if first.header else places[first.number] + 1
            right = self._token(last, places, ids, text, stop, 1) if last.header else places[last.number] + 1
            if left is None or right is None:
                return None
            found.append((left, right))
        return found

    def _token(
        self, anchor: _Anchor, places: list[int], ids: list[int], text: str, border: int, side: int
    ) -> int | None:
        begin = places[anchor.number] + 1
        end = begin + len(anchor.ids)
        if ids[begin:end] == anchor.ids:
            return end
        after = _NEXT.match(text, border)
        assert after is not None, "it matches nothing, too"
        head, span = self._head(anchor.header + after[0], len(anchor.header))
        token = span[side]
        return begin + token if ids[begin : begin + token + 1] == head[: token + 1] else None

    def _head(self, text: str, border: int) -> tuple[list[int], Span]:
        """Tokens of a text: all of them, the first that holds anything after the border, and the first after it."""
        if (known := self.heads.get((text, border))) is not None:
            return known
        (encoding,) = self.tokenizer.encode_batch([text])
        _, after = encoding.tokens_of(0, border)
        first, _ = encoding.tokens_of(border, len(text))
        if len(self.heads) < _MOST_HEADS:
            self.heads[text, border] = encoding.ids, (first, after)
        return encoding.ids, (first, after)


def _anchor(
    tokenizer: TextTokenizer, shape: Shape, border: Border, specials: list[list[re.Match[str]]]
) -> _Anchor | None:
    literal, offset = border
    before = [one.end() for one in specials[literal] if one.end() <= offset]
    if not before:
        return None
    header = shape.literals[literal][before[-1] : offset]
    if header and not tokenizer.tokens_are_texts:
        return None
    ids = tokenizer.encode_batch([header], positions=False)[0].ids if header else []
    if tokenizer.decode(ids) != header:  # the vocabulary lacks a character: the tokens do not say where the header ends
        return None
    return _Anchor(sum(map(len, specials[:literal])) + len(before) - 1, header, ids)
