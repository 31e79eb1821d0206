"""Which characters are trained, with what weight: against a count character by character."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.conversation import Conversation, MessageWeight
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.text.rendering import render_conversation, weighted
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


values = st.sampled_from([0.0, 0.25, 1.0, 3.0])


@st.composite
def spans(draw, length):
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return tuple((start, stop, draw(values)) for start, stop in pairs)


@given(st.data())
def test_weighted_parts_of_a_span(data):
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20))))
    whole, inner = data.draw(values), data.draw(spans(20))
    expected = np.zeros(21)
    expected[start:stop] = whole
    for left, right, weight in inner:
        expected[max(left, start) : max(min(right, stop), max(left, start))] = weight
    found = np.zeros(21)
    for left, right, weight in weighted((start, stop), whole, inner):
        assert left < right and weight > 0 and not found[left:right].any()
        found[left:right] = weight
    np.testing.assert_array_equal(found, expected)


words = st.lists(st.sampled_from(["the lazy dog", " ", "fox", "é😀", "\n", "7", "<think>", "</think>"]), max_size=6)


@given(st.data())
def test_weights_character_by_character(tokenizer, data):
    """A token weighs what its heaviest character does; above 0 exactly where the role is response."""
    messages, weights, expected_parts = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        answer = "".join(data.draw(words)) + "."
        messages += exchange("".join(data.draw(words)), answer)
        weight = MessageWeight(data.draw(st.none() | values), data.draw(spans(len(answer))))
        weights += [MessageWeight(), weight]
        expected = np.full(len(answer) + len("<|im_end|>"), 1.0 if weight.whole is None else weight.whole)
        for start, stop, value in weight.spans:
            expected[start:stop] = value
        expected_parts.append(expected)
    if not any(part.any() for part in expected_parts):
        return
    conversation = Conversation(messages, tuple(weights))
    for template in ("generation", "plain"):
        tokenizer.set_template(CHAT_TEMPLATES[template])
        rendering = render_conversation(tokenizer, conversation, Recipe())
        text, position = rendering.text, 0
        per_character = np.zeros(len(text))
        for answer, part in zip(messages[1::2], expected_parts, strict=True):
            written = "assistant\n" + answer["content"] + "<|im_end|>\n"
            position = text.index(written, position) + len("assistant\n")
            per_character[position : position + part.size] = part
        found = np.zeros(len(text))
        for start, stop, weight in rendering.segments:
            assert not found[start:stop].any()
            found[start:stop] = weight
        np.testing.assert_array_equal(found, per_character)
        (sample,) = tokenize_conversations(tokenizer, [conversation])
        offsets = tokenizer._tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        heaviest = np.array([per_character[start:stop].max() for start, stop in offsets], dtype=np.float32)
        np.testing.assert_array_equal(sample.roles, heaviest > 0)
        if sample.weights is not None:
            np.testing.assert_array_equal(sample.weights, heaviest)
        else:
            assert set(heaviest) <= {0.0, 1.0}
