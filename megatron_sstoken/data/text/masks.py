"""Conversations → tokens, roles and weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from megatron_sstoken.data.conversation import BadRow, Conversation, check_characters, check_contents
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, Recipe
from megatron_sstoken.data.text.anchors import Anchors
from megatron_sstoken.data.text.dropped import dropped_without_template
from megatron_sstoken.data.text.limits import listening
from megatron_sstoken.data.text.rendering import (
    Rendering,
    Segment,
    message_weights,
    render_conversation,
    special_note,
    weighted,
)
from megatron_sstoken.data.text.templates import template_names
from megatron_sstoken.data.tokenizer import Encoding, TextTokenizer, check_arguments

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
    batch: list[_Plan | BadRow] = []
    characters = 0
    with listening():
        for conversation in conversations:
            plan = _plan(tokenizer, conversation, recipe)
            batch.append(plan)
            characters += sum(map(len, plan.texts)) if isinstance(plan, _Plan) else 0
            if characters >= ENCODE_CHARACTERS:
                results += _carry_out(tokenizer, batch)
                batch, characters = [], 0
    return results + _carry_out(tokenizer, batch)


@dataclass(frozen=True)
class _Plan:
    """Texts to encode one by one; the segments are of the last one."""

    texts: list[str]
    segments: list[Segment]
    end_weight: float | None = None
    """Weight of the eos to add; None: nothing is to be added, and no bos either."""
    notes: tuple[str, ...] = ()
    anchors: Anchors | None = None
    """Of the segments: the text, which is the only one, is encoded without positions."""


def _plan(tokenizer: TextTokenizer, conversation: Conversation, recipe: Recipe) -> _Plan | BadRow:
    try:
        if tokenizer.template is None:
            return _plan_plain(tokenizer, conversation, recipe)
        rendering: Rendering = render_conversation(tokenizer, conversation, recipe)
        check_characters(rendering.text)
        return _Plan([rendering.text], rendering.segments, notes=rendering.notes, anchors=rendering.anchors)
    except BadRow as bad_row:
        return bad_row


def _plan_plain(tokenizer: TextTokenizer, conversation: Conversation, recipe: Recipe) -> _Plan:
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
    return _Plan([prompt, response], segments, whole, (*notes, *special_note(tokenizer, conversation)))


def _carry_out(tokenizer: TextTokenizer, batch: Sequence[_Plan | BadRow]) -> list[TokenizedSample | BadRow]:
    results: list[TokenizedSample | BadRow | None] = [plan if isinstance(plan, BadRow) else None for plan in batch]
    anchored = [(index, plan) for index, plan in enumerate(batch) if isinstance(plan, _Plan) and plan.anchors]
    if anchored:
        plans = [plan for _, plan in anchored]
        encodings = tokenizer.encode_batch([plan.texts[0] for plan in plans], positions=False)
        for (index, _), sample in zip(anchored, _anchored_samples(tokenizer, plans, encodings), strict=True):
            results[index] = sample
    others = [(index, plan) for index, plan in enumerate(batch) if isinstance(plan, _Plan) and results[index] is None]
    located = iter(tokenizer.encode_batch([text for _, plan in others for text in plan.texts]) if others else [])
    for index, plan in others:
        try:
            results[index] = _sample(tokenizer, plan, located)
        except BadRow as bad_row:
            results[index] = bad_row
    return [result for result in results if result is not None]


def _anchored_samples(
    tokenizer: TextTokenizer, plans: Sequence[_Plan], encodings: Sequence[Encoding]
) -> Iterator[TokenizedSample | None]:
    """The samples by the plans' anchors; None where they do not hold. Arrays are made once for all of them."""
    ids = [encoding.ids for encoding in encodings]
    stops = np.cumsum([len(one) for one in ids])
    tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(stops[-1]))
    roles = np.zeros(tokens.size, dtype=np.uint8)
    special = np.flatnonzero(tokenizer.special_mask[tokens])
    places, found_ids = special.tolist(), tokens[special].tolist()
    borders = [0, *np.searchsorted(special, stops).tolist()]
    start = 0
    for plan, one, stop, first, after in zip(plans, ids, stops.tolist(), borders, borders[1:], strict=False):
        assert plan.anchors is not None
        own = slice(start, stop)
        if plan.anchors.specials == found_ids[first:after]:
            here = [place - start for place in places[first:after]]
            found = plan.anchors.find(plan.texts[0], plan.segments, one, here)
        else:
            found = None
        yield None if found is None else _anchored_sample(plan, found, tokens[own], roles[own])
        start = stop


def _anchored_sample(
    plan: _Plan, found: Sequence[tuple[int, int]], tokens: np.ndarray, roles: np.ndarray
) -> TokenizedSample | None:
    """The sample whose segments are the tokens `found`; `roles` are filled in. None if there is nothing to learn."""
    learns = False
    for start, stop in found:
        roles[start:stop] = RESPONSE
        learns |= start < stop > 1
    if not learns:
        return None
    assert plan.anchors is not None
    if plan.anchors.equal_weights:
        return TokenizedSample(tokens, roles, None, plan.notes)
    weights = np.zeros(tokens.size, dtype=np.float32)
    for (start, stop), (*_, weight) in zip(found, plan.segments, strict=True):
        np.maximum(weights[start:stop], weight, out=weights[start:stop])
    return TokenizedSample(tokens, roles, weights, plan.notes)


def _sample(tokenizer: TextTokenizer, plan: _Plan, encodings: Iterator[Encoding]) -> TokenizedSample:
    *heads, last = islice(encodings, len(plan.texts))
    head = [token for encoding in heads for token in encoding.ids]
    tail = []
    if plan.end_weight is not None:
        assert tokenizer.eos_id is not None, "tokenize_conversations has looked"
        head = head if tokenizer.bos_id is None else [tokenizer.bos_id, *head]
        tail = [tokenizer.eos_id]
    tokens = np.array([*head, *last.ids, *tail], dtype=np.int32)
    weights = np.zeros(tokens.size, dtype=np.float32)
    for start, stop, weight in plan.segments:
        first, after = last.tokens_of(start, stop)
        part: Any = weights[len(head) + first : len(head) + after]
        np.maximum(part, weight, out=part)
    if tail:
        weights[-1] = plan.end_weight
    roles = np.where(weights > 0, RESPONSE, CONTEXT).astype(np.uint8)
    if not roles[1:].any():
        raise BadRow("no response token after the first token, so there is nothing to learn")
    return TokenizedSample(tokens, roles, None if np.array_equal(weights, roles) else weights, plan.notes)
