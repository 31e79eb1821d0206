"""Conversations → tokens, roles and weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sstoken.data.conversation import BadRow, Conversation, Span, check_characters, check_contents
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, Recipe
from megatron_sstoken.data.text.dropped import dropped_without_template
from megatron_sstoken.data.text.limits import listening
from megatron_sstoken.data.text.rendering import (
    Rendering,
    message_weights,
    render_conversation,
    special_note,
    weighted,
)
from megatron_sstoken.data.text.templates import template_names
from megatron_sstoken.data.tokenizer import ID_BYTES, Encoding, TextTokenizer, check_arguments, unpack_ids

CONTEXT, RESPONSE = 0, 1
ENCODE_CHARACTERS = 1 << 18
"""At a time, the most of a chunk: turning between Python and the tokenizer costs the processor its caches."""


@dataclass(frozen=True)
class TokenizedSample:
    """A conversation as tokens int32 [n], their roles uint8 [n] (0 context, 1 response) and weights fp32 [n]."""

    tokens: np.ndarray
    roles: np.ndarray
    weights: np.ndarray | None = None
    """0 where the role is context, above 0 elsewhere; None: 1 for every response token."""
    notes: tuple[str, ...] = ()
    """What the summary should tell of it, once with the number of samples."""


def tokenize_conversations(
    tokenizer: TextTokenizer, conversations: Sequence[Conversation], recipe: Recipe = DEFAULT_RECIPE
) -> list[TokenizedSample | BadRow]:
    """Conversations → tokens, roles and weights, in order; for a bad one, the reason.

    A token is response if it holds any character of a response (docs/data.md); of several weights in one token the
    largest counts. Without a template a single user → assistant exchange is `[bos] prompt response eos`. `ValueError` if
    the tokenizer has no eos then, or if a template argument has a name of ours.
    """
    if tokenizer.template is None and tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has no end-of-sequence token, which plain text needs: "
            "add one to the tokenizer or give --chat_template"
        )
    try:
        check_arguments(recipe.template_arguments)
    except BadRow as error:
        raise ValueError(str(error)) from error
    results: list[TokenizedSample | BadRow] = []
    batch: list[Rendering | BadRow] = []
    characters = 0
    with listening():
        for conversation in conversations:
            try:
                if tokenizer.template is None:
                    rendering: Rendering = _exchange(tokenizer, conversation, recipe)
                else:
                    rendering = render_conversation(tokenizer, conversation, recipe)
                    check_characters(rendering.text)
                batch.append(rendering)
                characters += sum(map(len, rendering.texts))
            except BadRow as bad_row:
                batch.append(bad_row)
            if characters >= ENCODE_CHARACTERS:
                results += _encode(tokenizer, batch)
                batch, characters = [], 0
    return results + _encode(tokenizer, batch)


@dataclass(frozen=True)
class _Exchange(Rendering):
    """A prompt and its response, the text, without a template."""

    prompt: str = ""
    end_weight: float = 1.0
    """Of the eos that follows the response."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt, self.text


def _exchange(tokenizer: TextTokenizer, conversation: Conversation, recipe: Recipe) -> _Exchange:
    messages = conversation.messages
    check_contents(messages)
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise BadRow(
            "the tokenizer has no chat template, so only one user message and one assistant message can be "
            f"prepared: give one with --chat_template: a file, or chatml, or another of {', '.join(template_names())}"
        )
    notes = []
    for kind, what in dropped_without_template(conversation):
        if kind not in recipe.allow_dropped:
            raise BadRow(
                f"the tokenizer has no chat template, so {what} cannot be written: give a --chat_template that does, "
                f"or --allow_dropped {kind}"
            )
        notes.append(f"left out for want of a chat template, as allowed: {kind}")
    prompt, response = (message["content"] for message in messages)
    weight = message_weights(conversation, recipe)[1]
    whole = weight.whole or 0.0
    segments = list(weighted((0, len(response)), whole, weight.spans))
    told = (*notes, *special_note(tokenizer, conversation))
    return _Exchange(response, segments, told, prompt=prompt, end_weight=whole)


def _encode(tokenizer: TextTokenizer, batch: Sequence[Rendering | BadRow]) -> list[TokenizedSample | BadRow]:
    results: list[TokenizedSample | BadRow | None] = [one if isinstance(one, BadRow) else None for one in batch]
    anchored = [(index, one) for index, one in enumerate(batch) if isinstance(one, Rendering) and one.anchors]
    if anchored:
        for (index, _), sample in zip(anchored, _by_anchors(tokenizer, [one for _, one in anchored]), strict=True):
            results[index] = sample
    others = [(index, one) for index, one in enumerate(batch) if isinstance(one, Rendering) and results[index] is None]
    texts = [text for _, one in others for text in one.texts]
    encodings = iter(tokenizer.encode_batch(texts) if texts else [])
    for index, one in others:
        try:
            results[index] = _by_positions(tokenizer, one, encodings)
        except BadRow as bad_row:
            results[index] = bad_row
    return [result for result in results if result is not None]


def _by_anchors(tokenizer: TextTokenizer, renderings: Sequence[Rendering]) -> Iterator[TokenizedSample | None]:
    """The samples by the anchors of all these; None where they do not hold. Arrays are made once for all of them."""
    packed = tokenizer.encode_packed([rendering.text for rendering in renderings])
    tokens = unpack_ids(b"".join(packed))
    roles = np.zeros(tokens.size, dtype=np.uint8)
    special = np.flatnonzero(tokenizer.special_mask[tokens])
    places, ids = special.tolist(), tokens[special].tolist()
    stops = np.cumsum([len(one) // ID_BYTES for one in packed])
    start = first = 0
    for rendering, one, stop, after in zip(
        renderings, packed, stops.tolist(), np.searchsorted(special, stops).tolist(), strict=True
    ):
        anchors = rendering.anchors
        assert anchors is not None
        sample = None
        if anchors.specials == ids[first:after]:
            here = [place - start for place in places[first:after]]
            if found := anchors.find(rendering.text, rendering.segments, one, here):
                sample = _sample_of(rendering, found, tokens[start:stop], roles[start:stop])
        yield sample
        start, first = stop, after


def _sample_of(
    rendering: Rendering, found: Sequence[Span], tokens: np.ndarray, roles: np.ndarray
) -> TokenizedSample | None:
    """The sample whose segments are the tokens `found`; `roles` are filled in. None if there is nothing to learn."""
    learns = False
    for start, stop in found:
        roles[start:stop] = RESPONSE
        learns |= start < stop > 1
    if not learns:
        return None
    assert rendering.anchors is not None
    if rendering.anchors.equal_weights:
        return TokenizedSample(tokens, roles, None, rendering.notes)
    weights = np.zeros(tokens.size, dtype=np.float32)
    for (start, stop), (*_, weight) in zip(found, rendering.segments, strict=True):
        np.maximum(weights[start:stop], weight, out=weights[start:stop])
    return TokenizedSample(tokens, roles, weights, rendering.notes)


def _by_positions(tokenizer: TextTokenizer, rendering: Rendering, encodings: Iterator[Encoding]) -> TokenizedSample:
    head: list[int] = []
    tail: list[int] = []
    if isinstance(rendering, _Exchange):
        assert tokenizer.eos_id is not None, "tokenize_conversations has looked"
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        head, tail = [*bos, *next(encodings).ids], [tokenizer.eos_id]
    encoding = next(encodings)
    tokens = np.array([*head, *encoding.ids, *tail], dtype=np.int32)
    weights = np.zeros(tokens.size, dtype=np.float32)
    for start, stop, weight in rendering.segments:
        first, after = encoding.tokens_of(start, stop)
        part: Any = weights[len(head) + first : len(head) + after]
        np.maximum(part, weight, out=part)
    if isinstance(rendering, _Exchange):
        weights[-1] = rendering.end_weight
    roles = np.where(weights > 0, RESPONSE, CONTEXT).astype(np.uint8)
    if not roles[1:].any():
        raise BadRow("no response token after the first token, so there is nothing to learn")
    return TokenizedSample(tokens, roles, None if np.array_equal(weights, roles) else weights, rendering.notes)
