"""Conversations → tokens, roles and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from megatron_sstoken.data.conversation import BadRow, Conversation, Message, Span
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, Recipe
from megatron_sstoken.data.templates import template_names
from megatron_sstoken.data.tokenizer import Encoding, TextTokenizer

CONTEXT, RESPONSE = 0, 1
ENCODE_BATCH = 16  # conversations: more live encodings cost more memory traffic than fewer calls save
ADD_MARKS = "in the chat template (--chat_template), put what the assistant says in {% generation %} marks"


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
    """Conversations → tokens and roles, in order; for a bad one, the reason.

    Roles come from the chat template's generation marks, or (a template without) from comparing token
    prefixes turn by turn. The end-of-turn token is part of the response, template text after it is not.
    Without a template a single user → assistant exchange is `[bos] prompt response eos`; `ValueError` if the
    tokenizer has no eos.
    """
    if tokenizer.template is None and tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has no end-of-sequence token, which plain text needs: "
            "add one to the tokenizer or give --chat_template"
        )
    results: list[TokenizedSample | BadRow] = []
    for start in range(0, len(conversations), ENCODE_BATCH):
        results += _tokenize_batch(tokenizer, [one.messages for one in conversations[start : start + ENCODE_BATCH]])
    return results


@dataclass(frozen=True)
class _Plan:
    """Texts to encode; from their encodings, the sample's ids and the ranges [start, stop) of responses."""

    texts: list[str]
    assign: Callable[[list[Encoding]], tuple[list[int], list[Span]]]

    def __post_init__(self) -> None:
        try:
            "".join(self.texts).encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{error.object[error.start]!r} is half a surrogate pair, not a character") from error


def _tokenize_batch(tokenizer: TextTokenizer, conversations: Sequence[list[Message]]) -> list[TokenizedSample | BadRow]:
    make = _plan_plain if tokenizer.template is None else _plan_marks if tokenizer.marked else _plan_prefixes
    plans = [_or_bad_row(make, tokenizer, messages) for messages in conversations]
    texts = [text for plan in plans if isinstance(plan, _Plan) for text in plan.texts]
    encodings = iter(tokenizer.encode_batch(texts, positions=tokenizer.marked))
    return [
        plan if isinstance(plan, BadRow) else _or_bad_row(_carry_out, plan, list(islice(encodings, len(plan.texts))))
        for plan in plans
    ]


def _or_bad_row(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except BadRow as bad_row:
        return bad_row


def _carry_out(plan: _Plan, encodings: list[Encoding]) -> TokenizedSample:
    ids, ranges = plan.assign(encodings)
    tokens = np.array(ids, dtype=np.int32)
    roles = np.full(len(ids), CONTEXT, dtype=np.uint8)
    for start, stop in ranges:
        roles[start:stop] = RESPONSE
    if not roles[1:].any():
        raise BadRow("no response token after the first token, so there is nothing to learn")
    return TokenizedSample(tokens, roles)


def _plan_plain(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise BadRow(
            "the tokenizer has no chat template, so only one user message and one assistant message can be "
            f"prepared: give one with --chat_template: a file, or chatml, or another of {', '.join(template_names())}"
        )

    def assign(encodings: list[Encoding]) -> tuple[list[int], list[Span]]:
        prompt, response = (encoding.ids for encoding in encodings)
        assert tokenizer.eos_id is not None, "tokenize_conversations has looked"
        head = prompt if tokenizer.bos_id is None else [tokenizer.bos_id, *prompt]
        ids = [*head, *response, tokenizer.eos_id]
        return ids, [(len(head), len(ids))]

    return _Plan([message["content"] for message in messages], assign)


def _plan_marks(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    chat = tokenizer.render(messages)
    if all(start == stop for start, stop in chat.spans):
        raise BadRow(f"the template's generation marks are empty for this conversation: {ADD_MARKS}")

    def assign(encodings: list[Encoding]) -> tuple[list[int], list[Span]]:
        (whole,) = encodings
        borders = [(whole.tokens_before(start), whole.tokens_before(stop)) for start, stop in chat.spans]
        return whole.ids, [(start, _end_of_turn(tokenizer, whole.ids, start, stop)) for start, stop in borders]

    return _Plan([chat.text], assign)


def _end_of_turn(tokenizer: TextTokenizer, ids: list[int], start: int, stop: int) -> int:
    """Where the response of the marked tokens [start, stop) ends.

    After the end-of-turn token that follows directly, else after the last one inside the marks (template text
    after it is context), else at the marks' end.
    """
    if stop < len(ids) and ids[stop] in tokenizer.end_of_turn_ids:
        return stop + 1
    return _after_last(ids, start, stop, tokenizer.end_of_turn_ids)


def _after_last(ids: list[int], start: int, stop: int, wanted: frozenset[int]) -> int:
    """Index after the last of the `wanted` tokens in [start, stop); `stop` if there is none."""
    return next((index + 1 for index in range(stop - 1, start - 1, -1) if ids[index] in wanted), stop)


def _plan_prefixes(tokenizer: TextTokenizer, messages: list[Message]) -> _Plan:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [tokenizer.render(messages).text]
    for turn in turns:
        texts.append(tokenizer.render(messages[:turn], add_generation_prompt=True).text)
        texts.append(tokenizer.render(messages[: turn + 1]).text if turn + 1 < len(messages) else texts[0])
    unique = list(dict.fromkeys(texts))
    places = [unique.index(text) for text in texts]
    return _Plan(unique, partial(_assign_prefixes, tokenizer, messages, turns, places))


def _assign_prefixes(
    tokenizer: TextTokenizer,
    messages: list[Message],
    turns: list[int],
    places: list[int],
    encodings: list[Encoding],
) -> tuple[list[int], list[Span]]:
    whole, *borders = (encodings[place].ids for place in places)
    ranges = []
    for turn, before, after in zip(turns, borders[::2], borders[1::2], strict=True):
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise BadRow(
                f"the tokens of the assistant's message {turn} cannot be told exactly: the conversation "
                f"rendered up to it does not give a prefix of the whole's tokens: {ADD_MARKS}"
            )
        start, stop = len(before), len(after)
        if start < stop and after[start] in tokenizer.special_ids - tokenizer.end_of_turn_ids:
            _require_generation_prompt(tokenizer, messages[:turn], turn)
        ranges.append((start, _after_last(whole, start, stop, tokenizer.special_ids | tokenizer.end_of_turn_ids)))
    return whole, ranges


def _require_generation_prompt(tokenizer: TextTokenizer, messages: list[Message], turn: int) -> None:
    """A turn may begin with a special token, but not with the role header, the generation prompt's part."""
    if tokenizer.render(messages, add_generation_prompt=True) == tokenizer.render(messages):
        raise BadRow(
            f"the template ignores add_generation_prompt, so the header of the assistant's message {turn} "
            f"would count as response: {ADD_MARKS}"
        )
