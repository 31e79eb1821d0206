"""Conversations → text, and which of its characters are trained with what weight."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_sstoken.data.conversation import BadRow, Conversation, MessageWeight, Segment, Span, check_contents
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.rows.message_weights import says_more_than_zero
from megatron_sstoken.data.text.anchors import Anchors
from megatron_sstoken.data.text.borders import (
    REMEDY,
    Response,
    UnmarkedResponses,
    marked_responses,
    prefix_responses,
)
from megatron_sstoken.data.text.dropped import check_dropped
from megatron_sstoken.data.text.shapes import MOST_SHAPES, Shape, shape_of
from megatron_sstoken.data.text.skeleton import THINK_TAGS, Layout, Place, lay_out
from megatron_sstoken.data.tokenizer import RenderedChat, TextTokenizer

NO_END = "the chat template writes no token that ends a turn after the answer: the model will not learn to stop"
SPECIAL_IN_CONTENT = "a message holds the text of a special token, which is encoded as that token"


@dataclass(frozen=True)
class Rendering:
    """A conversation as the model reads it."""

    text: str
    segments: list[Segment]
    """What is trained, ascending and apart; all other characters are context."""
    notes: tuple[str, ...] = ()
    anchors: Anchors | None = None
    """Of the segments, where they are known; the text has no special tokens but the template's then."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What is encoded, each alone."""
        return (self.text,)


def render_conversation(tokenizer: TextTokenizer, conversation: Conversation, recipe: Recipe) -> Rendering:
    """Apply the chat template, and find what of its text is trained.

    Raises `BadRow` where the template leaves something out that `recipe.allow_dropped` does not name, or where a
    response cannot be told exactly.
    """
    assert tokenizer.template is not None
    key, pieces = shape_of(conversation, recipe, tokenizer.specials) or (None, [])
    shape, anchors = tokenizer.shapes.get(key, (None, None))
    if shape and (written := shape.write(pieces)):
        text, segments = written
        return Rendering(text, segments, shape.notes, anchors)
    check_contents(conversation.messages)
    arguments = {**recipe.template_arguments, **conversation.template_arguments}
    messages = tokenizer.as_template_wants(conversation.messages)
    chat = tokenizer.render(messages, tools=conversation.tools, arguments=arguments)
    if shape and (segments := shape.trained(chat.text, pieces, chat.spans)):
        return Rendering(chat.text, segments, shape.notes, anchors)
    rendering, layout = read_rendering(tokenizer, conversation, recipe, chat)
    shape = Shape.of(layout, pieces, chat.spans, rendering.segments, rendering.notes) if key else None
    if shape and len(tokenizer.shapes) < MOST_SHAPES:
        if tokenizer.is_verbatim:
            shape = shape.seeing_trims(messages, lambda some: tokenizer.render(some, arguments=arguments).text)
        tokenizer.shapes[key] = shape, Anchors.of(shape, tokenizer)
    return rendering


def read_rendering(
    tokenizer: TextTokenizer, conversation: Conversation, recipe: Recipe, chat: RenderedChat
) -> tuple[Rendering, Layout]:
    """Find what of a rendered conversation is trained, with nothing known of others."""
    arguments = {**recipe.template_arguments, **conversation.template_arguments}

    def render(messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        return tokenizer.render(
            messages, add_generation_prompt, tools=conversation.tools, arguments=arguments, locate_marks=False
        ).text

    messages = tokenizer.as_template_wants(conversation.messages)
    layout = lay_out(messages, chat.text, render)
    notes = check_dropped(conversation, layout, recipe)
    weights = message_weights(conversation, recipe)
    prompt = tokenizer.generation_prompt(conversation.tools, arguments)
    if tokenizer.marked:
        responses = marked_responses(tokenizer, chat, layout, prompt)
    elif layout.skeleton is not None:
        responses = UnmarkedResponses(tokenizer, layout, render, prompt).find()
    else:
        responses = prefix_responses(tokenizer, layout, messages, render, prompt)
    _check_responses(responses, layout, weights)
    segments = [
        segment
        for response in responses
        for segment in _segments(response, layout, weights[response.message], recipe.thinking_weight)
    ]
    if not all(response.ended for response in responses if says_more_than_zero(weights[response.message])):
        notes.append(NO_END)
    return Rendering(chat.text, sorted(segments), (*notes, *special_note(tokenizer, conversation))), layout


def message_weights(conversation: Conversation, recipe: Recipe) -> list[MessageWeight]:
    """The weight of each message, where neither the row nor the recipe says nothing; 0 for all but the assistant's."""
    last = max(index for index, message in enumerate(conversation.messages) if message["role"] == "assistant")
    weights = []
    for index, message in enumerate(conversation.messages):
        said = conversation.weight_of(index)
        usual = 1.0 if recipe.turns == "all" or index == last else 0.0
        whole = usual if said.whole is None else said.whole
        weights.append(replace(said, whole=whole) if message["role"] == "assistant" else MessageWeight(0.0))
    if not any(map(says_more_than_zero, weights)):
        raise BadRow("every assistant message has weight 0, so there is nothing to learn")
    return weights


def special_note(tokenizer: TextTokenizer, conversation: Conversation) -> Iterator[str]:
    """The note on contents that hold the text of a special token."""
    if any(tokenizer.specials.is_in(message["content"]) for message in conversation.messages):
        yield SPECIAL_IN_CONTENT


def weighted(span: Span, whole: float, spans: Iterable[Segment]) -> Iterator[Segment]:
    """A span of one weight in which others, ascending and apart, have weights of their own; without what has weight 0."""
    start, stop = span
    for left, right, weight in spans:
        left, right = max(left, start), min(right, stop)
        if left >= right:
            continue
        yield from ((start, left, whole),) if whole and start < left else ()
        yield from ((left, right, weight),) if weight else ()
        start = right
    yield from ((start, stop, whole),) if whole and start < stop else ()


def _check_responses(responses: Sequence[Response], layout: Layout, weights: Sequence[MessageWeight]) -> None:
    """Look at the responses from the other side: all that the assistant says is in them, and nothing else."""
    spans = sorted((start, stop, response.message) for response in responses for start, stop in response.spans)
    starts = [start for start, *_ in spans]
    roles = [message["role"] for message in layout.marker.messages]
    for place in layout.places:
        index = bisect_left(starts, place.start + 1) - 1
        start, stop, message = spans[index] if index >= 0 else (0, 0, -1)
        inside = place.stop <= stop
        apart = place.start >= stop
        said_by = place.piece.message
        wanted = roles[said_by] == "assistant"
        if wanted and says_more_than_zero(weights[said_by]) and not (inside and message == said_by):
            part = "tool call" if place.piece.part in ("name", "argument") else place.piece.part
            raise BadRow(
                f"the {part} of the assistant's message {said_by} would not be trained: {REMEDY}, or give it weight 0"
            )
        if not wanted and not apart:
            raise BadRow(f"the {roles[said_by]}'s message {said_by} would be trained: {REMEDY}")
    found = {response.message for response in responses}
    for index, one in enumerate(layout.marker.messages):
        if index in found or not says_more_than_zero(weights[index]) or not (one["content"] or one.get("tool_calls")):
            continue
        raise BadRow(f"the assistant's message {index} would not be trained: {REMEDY}, or give it weight 0")


def _segments(response: Response, layout: Layout, weight: MessageWeight, thinking_weight: float) -> Iterator[Segment]:
    places = [
        place
        for start, stop in response.spans
        for place in _between(layout.places, start, stop)
        if place.piece.message == response.message
    ]
    own = list(_content_spans(layout, places, weight, response)) if weight.spans else []
    weighs_thinking = says_more_than_zero(weight) and (thinking_weight != 1.0 or weight.thinking is not None)
    thought = _thinking(response, layout.text, places) if weighs_thinking else None
    if thought and weight.thinking is not None:
        own = [(*thought, weight.thinking), *(span for span in own if span[0] >= thought[1])]
    segments = [segment for span in response.spans for segment in weighted(span, weight.whole or 0.0, own)]
    if thought is None:
        yield from segments
        return
    for start, stop, value in segments:
        inside = [(*thought, value * thinking_weight)]
        yield from weighted((start, stop), value, inside)


def _between(places: Sequence[Place], start: int, stop: int) -> Sequence[Place]:
    first = bisect_left(places, start, key=lambda place: place.start)
    return places[first : bisect_left(places, stop, key=lambda place: place.start)]


def _content_spans(
    layout: Layout, places: Sequence[Place], weight: MessageWeight, response: Response
) -> Iterator[Segment]:
    """Spans of `content` → spans of the text, by the pieces of content and what stands between them unchanged."""
    content = layout.marker.messages[response.message]["content"]
    said = [place for place in places if place.piece.content_start is not None]
    if not all(place.exact for place in said):
        raise BadRow(f"weights of spans in message {response.message}: the chat template writes its content escaped")
    lower, upper = min(start for start, _ in response.spans), max(stop for _, stop in response.spans)
    known: list[tuple[int, int, int]] = []  # start, stop in content; shift to the text
    for place in said:
        assert place.piece.content_start is not None
        start, shift = place.piece.content_start, place.start - place.piece.content_start
        stop = start + place.stop - place.start
        before = known[-1][1] if known else 0
        while start > before and start + shift > lower and content[start - 1] == layout.text[start + shift - 1]:
            start -= 1
        known.append((start, stop, shift))
    if known:
        start, stop, shift = known.pop()
        while stop < len(content) and stop + shift < upper and content[stop] == layout.text[stop + shift]:
            stop += 1
        known.append((start, stop, shift))
    for left, right, value in weight.spans:
        if right > len(content):
            raise BadRow(
                f"a span of weights in message {response.message} ends at character {right:,}, and its content has "
                f"{len(content):,}"
            )
        for start, stop, shift in known:
            if max(left, start) < min(right, stop):
                yield max(left, start) + shift, min(right, stop) + shift, value


def _thinking(response: Response, text: str, places: Sequence[Place]) -> Span | None:
    """The response's thinking, from its beginning to the closing tag and the spaces after it, or to its end without one."""
    start, stop = response.spans[0]
    said = [place.stop for place in places if place.piece.part == "reasoning"]
    for opening, closing in THINK_TAGS:
        opened = re.compile(r"\s*" + re.escape(opening)).match(text, start, stop)
        close = text.find(closing, max([*said, opened.end() if opened else start]), response.spans[-1][1])
        begun = opened or text[max(0, start - 80) : start].rstrip().endswith(opening)
        if not begun and (not said or close < 0):  # what is said before a closing tag needs no opening one
            continue
        if close < 0:  # cut off while it thought
            return start, response.spans[-1][1]
        after = close + len(closing)
        return start, after + len(text[after:stop]) - len(text[after:stop].lstrip())
    if said:
        raise BadRow(
            f"the thinking of message {response.message} has a weight of its own, and the chat template writes it in none "
            f"of the tags that are known ({', '.join(opening for opening, _ in THINK_TAGS)}): use another --chat_template"
        )
    return None
