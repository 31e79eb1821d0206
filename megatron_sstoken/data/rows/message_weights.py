"""What a row says about how much its messages count."""

from collections.abc import Sequence
from typing import Any

from megatron_sstoken.data.conversation import BadRow, MessageWeight
from megatron_sstoken.data.rows.row_values import kind

NUMBERS = ("weight", "loss_weight", "loss_scale")
"""Keys that hold a weight: OpenAI's and Mistral's, LLaMA-Factory's, ms-swift's."""
SWITCHES = ("train", "training", "loss")
"""Keys that say true or false: axolotl's (both), ms-swift's."""
SPANS = ("spans", "train_detail")
"""Keys that weigh parts of the content: ours, axolotl's."""
LARGEST, SMALLEST = 1e30, 1e-30  # what fp32 holds with room for products and sums
UNWEIGHTED = MessageWeight()

WeightedSpan = tuple[int, int, float]


def take_whole(fields: dict[str, Any], what: str) -> float | None:
    """Take the keys of weights out of `fields`; the weight that they give, else None. Raises `BadRow`."""
    found = {key: _number(fields.pop(key), f"`{key}` of {what}") for key in NUMBERS if key in fields}
    found |= {key: _switch(fields.pop(key), f"`{key}` of {what}") for key in SWITCHES if key in fields}
    if len(set(found.values())) > 1:
        raise BadRow(f"{' and '.join(f'`{key}`' for key in found)} of {what} contradict each other: keep one")
    return next(iter(found.values()), None)


def take_weight(fields: dict[str, Any], content: str, parts: list[WeightedSpan], what: str) -> MessageWeight:
    """Take the keys of weights out of a message's `fields`.

    `parts` are the weighted parts of `content`, if it came in parts. Raises `BadRow`.
    """
    whole = take_whole(fields, what)
    given = {key: fields.pop(key) for key in SPANS if key in fields}
    if len(given) + bool(parts) > 1:
        raise BadRow(f"more than one of {', '.join(SPANS)} and weights of parts in {what}: keep one")
    spans = parts
    if "spans" in given:
        spans = [_span(entry, f"`spans` of {what}") for entry in _entries(given["spans"], f"`spans` of {what}")]
    if "train_detail" in given:
        spans = _train_detail(given["train_detail"], len(content), whole, f"`train_detail` of {what}")
    return MessageWeight(whole, _at_words(_ordered(spans, len(content), what), content))


def learns(weight: MessageWeight) -> bool:
    """Whether anything of such a message is trained on."""
    return weight.whole is None or says_more_than_zero(weight)


def says_more_than_zero(weight: MessageWeight) -> bool:
    """Whether the row itself asks for training on the message."""
    return bool(weight.whole or weight.thinking) or any(value > 0 for *_, value in weight.spans)


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise BadRow(f"{what} must be a number, not {kind(value)}")
    if not (value == 0 or SMALLEST <= value <= LARGEST):  # true for NaN, too
        raise BadRow(f"{what} must be 0, or from {SMALLEST:g} to {LARGEST:g}")
    return float(value)


def _switch(value: Any, what: str) -> float:
    if not isinstance(value, bool):
        raise BadRow(f"{what} must be true or false, not {kind(value)}")
    return float(value)


def _entries(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadRow(f"{what} must be a list of objects")
    return value


def _offset(entry: dict[str, Any], key: str, what: str) -> int:
    if type(offset := entry.get(key)) is not int:
        raise BadRow(f"`{key}` in {what} must be a whole number of characters, not {kind(offset)}")
    return offset


def _span(entry: dict[str, Any], what: str) -> WeightedSpan:
    if unknown := entry.keys() - {"start", "stop", "weight"}:
        raise BadRow(f"{what} takes start, stop and weight, not {', '.join(sorted(map(repr, unknown)))}")
    weight = _number(entry.get("weight"), f"`weight` in {what}")
    return _offset(entry, "start", what), _offset(entry, "stop", what), weight


def _train_detail(value: Any, length: int, whole: float | None, what: str) -> list[WeightedSpan]:
    """axolotl's: the last character is inside, and what no entry covers is not trained."""
    entries = _entries(value, what)
    if not entries:
        raise BadRow(f"{what} is empty: leave it out, or write `train`: false")
    spans = [
        (
            _offset(entry, "begin_offset", what),
            _offset(entry, "end_offset", what) + 1,
            _switch(entry.get("train"), f"`train` in {what}"),
        )
        for entry in entries
    ]
    if whole == 0 and any(weight for *_, weight in spans):
        raise BadRow(f"{what} and `train`: false contradict each other: keep one")
    ordered = _ordered(spans, length, what)
    starts = [0, *(stop for _, stop, _ in ordered)]
    stops = [*(start for start, _, _ in ordered), length]
    return [*ordered, *((start, stop, 0.0) for start, stop in zip(starts, stops, strict=True) if start < stop)]


def _at_words(spans: Sequence[WeightedSpan], content: str) -> tuple[WeightedSpan, ...]:
    """Spans whose borders before a word lie before the space that leads to it.

    Most tokenizers put that space into the word's token. The space's own weight would decide about the token, and a span of
    weight 0 over a word would do nothing.
    """

    def border(position: int) -> int:
        leads = 0 < position < len(content) and content[position - 1] == " " and not content[position].isspace()
        return position - 1 if leads else position

    moved = ((border(start), border(stop), weight) for start, stop, weight in spans)
    return tuple((start, stop, weight) for start, stop, weight in moved if start < stop)


def _ordered(spans: list[WeightedSpan], length: int, what: str) -> tuple[WeightedSpan, ...]:
    ordered = sorted(spans)
    for start, stop, _ in ordered:
        if not 0 <= start < stop <= length:
            raise BadRow(f"the span from {start:,} to {stop:,} in {what} is empty or outside its {length:,} characters")
    for (_, stop, _), (start, _, _) in zip(ordered, ordered[1:], strict=False):
        if start < stop:
            raise BadRow(f"spans in {what} overlap at character {start:,}: keep one weight a character")
    return tuple(ordered)
