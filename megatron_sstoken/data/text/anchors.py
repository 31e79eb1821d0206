"""Tokens of borders by the special tokens before them, for texts that are encoded without positions, which is faster.

Special tokens split a text, and each part is encoded alone: what follows one begins a token. For a border some
characters after it, such as a header's end, these few are encoded alone, and looked for in the tokens of the whole.
Where any of this does not hold, positions say where borders are.
"""

import re
from dataclasses import dataclass
from itertools import chain

from megatron_sstoken.data.conversation import Segment, Span
from megatron_sstoken.data.text.shapes import Border, Shape
from megatron_sstoken.data.tokenizer import ID_BYTES, TextTokenizer, pack_ids, unpack_ids

_NEXT = re.compile(r"\s*\S?")
"""What may be in one token with the end of a header, and what keeps its last space from it."""
_MOST_HEADS = 4096


@dataclass(frozen=True)
class _Anchor:
    """A border: after which of the text's special tokens, the text between, and its tokens."""

    number: int
    header: str
    packed: bytes
    ends: bool
    """Whether it is where a segment ends."""
    heads: dict[str, tuple[bytes, int]]
    """By what follows the header: tokens up to the border's, packed, and the number of this one."""


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

    @classmethod
    def of(cls, shape: Shape, tokenizer: TextTokenizer) -> "Anchors | None":
        """None where special tokens do not say where the shape's borders are."""
        if not tokenizer.splits_at_specials:
            return None
        found = [list(tokenizer.specials.pattern.finditer(literal)) for literal in shape.literals]
        heads: dict[tuple[str, bool], dict] = {}
        borders = []
        for start, stop, _ in shape.segments:
            pair = [
                _anchor(tokenizer, shape, border, found, heads, ends) for border, ends in ((start, False), (stop, True))
            ]
            if pair[0] is None or pair[1] is None:
                return None
            borders.append((pair[0], pair[1]))
        specials = tokenizer.encode_packed([one[0] for one in chain.from_iterable(found)])
        if any(len(one) != ID_BYTES for one in specials):
            return None
        ids = unpack_ids(b"".join(specials)).tolist()
        return cls(tokenizer, ids, borders, all(weight == 1.0 for *_, weight in shape.segments))

    def find(self, text: str, segments: list[Segment], packed: bytes, places: list[int]) -> list[Span] | None:
        """The segments as tokens [start, stop); None where this text is not like the others.

        `packed`: its tokens int32; `places`: those of the special ones among them, which are `specials`.
        """
        found = []
        for (first, last), (start, stop, _) in zip(self.borders, segments, strict=True):
            left, right = places[first.number] + 1, places[last.number] + 1
            if first.header and (left := self._after_header(first, left, packed, text, start)) < 0:
                return None
            if last.header and (right := self._after_header(last, right, packed, text, stop)) < 0:
                return None
            found.append((left, right))
        return found

    def _after_header(self, anchor: _Anchor, begin: int, packed: bytes, text: str, border: int) -> int:
        """The token of a border, whose header begins with token `begin`; -1 where the tokens do not say."""
        at = begin * ID_BYTES
        if packed.startswith(anchor.packed, at):
            return begin + len(anchor.packed) // ID_BYTES
        after = _NEXT.match(text, border)
        assert after is not None, "it matches nothing, too"
        head = anchor.heads.get(after[0]) or self._head(anchor, after[0])
        return begin + head[1] if packed.startswith(head[0], at) else -1

    def _head(self, anchor: _Anchor, after: str) -> tuple[bytes, int]:
        """Of a header with what follows it. The border's token is the first with any of that, or the first after the header."""
        text, border = anchor.header + after, len(anchor.header)
        (encoding,) = self.tokenizer.encode_batch([text])
        number = encoding.tokens_of(0, border)[1] if anchor.ends else encoding.tokens_of(border, len(text))[0]
        head = pack_ids(encoding.ids[: number + 1]), number
        if len(anchor.heads) < _MOST_HEADS:
            anchor.heads[after] = head
        return head


def _anchor(
    tokenizer: TextTokenizer,
    shape: Shape,
    border: Border,
    specials: list[list[re.Match[str]]],
    heads: dict[tuple[str, bool], dict],
    ends: bool,
) -> _Anchor | None:
    literal, offset = border
    before = [one.end() for one in specials[literal] if one.end() <= offset]
    if not before:
        return None
    header = shape.literals[literal][before[-1] : offset]
    if header and not tokenizer.tokens_are_texts:
        return None
    (packed,) = tokenizer.encode_packed([header])
    if tokenizer.decode(unpack_ids(packed).tolist()) != header:
        return None  # the vocabulary lacks a character: the tokens do not say where the header ends
    number = sum(map(len, specials[:literal])) + len(before) - 1
    return _Anchor(number, header, packed, ends, heads.setdefault((header, ends), {}))
