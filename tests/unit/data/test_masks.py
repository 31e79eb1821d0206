"""Conversations → tokens and roles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer import load_tokenizer
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_sentencepiece, make_tokenizer, random_conversations

MULTI_TURN = [
    *exchange("the quick fox", "the lazy dog", system="you are helpful"),
    *exchange("how many", "7"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer without a template; tests set theirs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, chat_template=None, bos_token="<|begin_of_text|>")
    return load_tokenizer(folder)


def tokenize(tokenizer, template, messages):
    """The sample of one conversation, or the `BadRow`."""
    tokenizer.set_template(CHAT_TEMPLATES.get(template, template))
    (result,) = tokenize_conversations(tokenizer, [Conversation(messages)])
    return result


def response_texts(tokenizer, sample):
    """The decoded text of each run of response tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[0], sample.roles, [0]])))
    runs = zip(borders[::2], borders[1::2], strict=True)
    return [tokenizer._tokenizer.decode(sample.tokens[start:stop]) for start, stop in runs]


@pytest.mark.parametrize("template", ["generation", "generation_newline", "plain"])
def test_chatml_roles(tokenizer, template):
    """The end of turn is trained, the newline after it and the headers are not."""
    sample = tokenize(tokenizer, template, MULTI_TURN)
    assert response_texts(tokenizer, sample) == ["the lazy dog<|im_end|>", "7<|im_end|>"]
    assert tokenizer._tokenizer.decode(sample.tokens) == tokenizer.render(MULTI_TURN).text
    assert sample.tokens.dtype == np.int32 and sample.roles.dtype == np.uint8


@pytest.mark.parametrize("template", ["llama3", "llama3_generation"])
def test_header_template_roles(tokenizer, template):
    sample = tokenize(tokenizer, template, MULTI_TURN)
    assert response_texts(tokenizer, sample) == ["the lazy dog<|eot_id|>", "7<|eot_id|>"]
    begins = sample.tokens == tokenizer.bos_id
    assert begins[0] and begins.sum() == 1


def test_every_method_finds_the_same_roles(tokenizer):
    conversations = [*random_conversations(20), [*exchange("the quick fox", ""), *exchange("how many", "7")]]
    results = {}
    for name in ("generation", "generation_newline", "plain"):
        tokenizer.set_template(CHAT_TEMPLATES[name])
        results[name] = tokenize_conversations(tokenizer, [*map(Conversation, conversations)])
    for marked, newline, plain in zip(*results.values(), strict=True):
        np.testing.assert_array_equal(marked.tokens, plain.tokens)
        np.testing.assert_array_equal(marked.roles, plain.roles)
        np.testing.assert_array_equal(newline.roles, plain.roles)


text = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_roles_follow_the_characters(tokenizer, turns):
    """Whatever the text, a token is response if it starts in a turn or is the end token after it."""
    messages = [message for user, assistant in turns for message in exchange(user, assistant)] + exchange("", "7")
    sample = tokenize(tokenizer, "generation", messages)
    chat = tokenizer.render(messages)
    offsets = tokenizer._tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    end = len("<|im_end|>")
    inside = [any(start <= first < stop + end for start, stop in chat.spans) for first, _ in offsets]
    np.testing.assert_array_equal(sample.roles, np.array(inside, dtype=np.uint8))


def test_a_straddling_token_belongs_to_where_it_starts(tokenizer):
    """ " the" with its space is one token; the border lies between the space and the word."""
    template = "{{ messages[0].content }} {% generation %}{{ messages[1].content }}{% endgeneration %}<|im_end|>"
    sample = tokenize(tokenizer, template, exchange("the", "the lazy"))
    assert response_texts(tokenizer, sample) == [" lazy<|im_end|>"]


def test_pad_equal_to_end_of_turn_is_trained(tokenizer):
    assert tokenizer._tokenizer.pad_token_id == tokenizer.eos_id
    template = CHAT_TEMPLATES["generation"].replace("<|im_end|>\n", "<|endoftext|>")
    sample = tokenize(tokenizer, template, MULTI_TURN)
    ends = sample.tokens == tokenizer.eos_id
    assert sample.roles[ends].tolist() == [0, 0, 1, 0, 1]  # system, user, assistant, user, assistant


def test_prefixes_that_are_not_exact_are_refused(tokenizer):
    stripping = CHAT_TEMPLATES["plain"].replace(
        "message['content'] +",
        "(message['content'] if loop.last or message['role'] != 'assistant' else '') +",
    )
    result = tokenize(tokenizer, stripping, MULTI_TURN)
    assert isinstance(result, BadRow)
    assert "message 2 cannot be told exactly" in str(result) and "{% generation %}" in str(result)
    single = tokenize(tokenizer, stripping, MULTI_TURN[:3])
    assert response_texts(tokenizer, single) == ["the lazy dog<|im_end|>"]


def test_content_that_merges_with_the_prompt_is_refused_without_marks(tokenizer):
    template = CHAT_TEMPLATES["plain"].replace("\n", " ")
    assert "cannot be told exactly" in str(tokenize(tokenizer, template, exchange("a", "the dog")))


def test_template_without_generation_prompt_is_refused(tokenizer):
    template = CHAT_TEMPLATES["plain"].partition("{% if add_generation_prompt %}")[0]
    assert "ignores add_generation_prompt" in str(tokenize(tokenizer, template, MULTI_TURN))


def test_marks_without_effect_are_refused(tokenizer):
    never = "{% if m.role == 'bot' %}{% generation %}x{% endgeneration %}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + never + "{% endfor %}"
    assert "marks are empty" in str(tokenize(tokenizer, template, MULTI_TURN))
    empty = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    assert "marks are empty" in str(tokenize(tokenizer, empty, MULTI_TURN))


def test_template_that_refuses_gives_the_reason(tokenizer):
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHAT_TEMPLATES["generation"]
    assert "no system role" in str(tokenize(tokenizer, template, MULTI_TURN))
    assert response_texts(tokenizer, tokenize(tokenizer, template, MULTI_TURN[3:])) == ["7<|im_end|>"]


def test_half_a_surrogate_pair_is_refused(tokenizer):
    messages = exchange("a", "x\ud800")
    for template in ("generation", "plain", None):
        assert "half a surrogate pair" in str(tokenize(tokenizer, template, messages))


def test_one_bad_conversation_leaves_the_others(tokenizer):
    tokenizer.set_template(None)
    first, second, third = tokenize_conversations(
        tokenizer, [*map(Conversation, [exchange("a", "b"), MULTI_TURN, exchange("c", "d")])]
    )
    assert isinstance(second, BadRow) and "--chat_template" in str(second)
    assert [response_texts(tokenizer, sample) for sample in (first, third)] == [
        ["b<|endoftext|>"],
        ["d<|endoftext|>"],
    ]


def test_plain_text_has_bos_and_eos_once(tokenizer):
    sample = tokenize(tokenizer, None, exchange("the quick fox", " the lazy dog"))
    expected = "<|begin_of_text|>the quick fox the lazy dog<|endoftext|>"
    assert tokenizer._tokenizer.decode(sample.tokens) == expected
    assert response_texts(tokenizer, sample) == [" the lazy dog<|endoftext|>"]


def test_plain_text_needs_eos(tmp_path):
    make_tokenizer(tmp_path, chat_template=None, eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="has no end-of-sequence token.*--chat_template"):
        tokenize_conversations(load_tokenizer(tmp_path), [exchange("a", "b")])


def test_sentencepiece_roles(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}user {{ m.content }} assistant"
        "{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    messages = [*exchange("the fox", "the dog"), *exchange("how many", "7 apples")]
    marked = load_tokenizer(make_sentencepiece(tmp_path / "toy.model"), template)
    sample = tokenize(marked, template, messages)
    assert (sample.tokens == marked.bos_id).sum() == 2 and (sample.tokens == marked.eos_id).sum() == 2
    decoded = marked._model.decode(sample.tokens[sample.roles == 1].tolist())
    assert decoded == "the dog 7 apples"
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    np.testing.assert_array_equal(tokenize(marked, unmarked, messages).roles, sample.roles)
    plain = tokenize(marked, None, exchange("the fox", "the dog"))
    assert plain.tokens[0] == marked.bos_id and plain.tokens[-1] == marked.eos_id and plain.roles[-1] == 1
