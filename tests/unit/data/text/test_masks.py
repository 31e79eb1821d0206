"""Conversations → tokens and roles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.conversation import BadRow, Conversation, MessageWeight
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.rows.formats import parse_row
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.text.rendering import NO_END, SPECIAL_IN_CONTENT
from megatron_sstoken.data.tokenizer_files import load_tokenizer
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
    """Whatever the text, a token is response if it holds a character of a turn or of the end token after it."""
    messages = [message for user, assistant in turns for message in exchange(user, assistant)] + exchange("", "7")
    sample = tokenize(tokenizer, "generation", messages)
    chat = tokenizer.render(messages)
    offsets = tokenizer._tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    end = len("<|im_end|>")
    inside = [any(start < last and first < stop + end for start, stop in chat.spans) for first, last in offsets]
    np.testing.assert_array_equal(sample.roles, np.array(inside, dtype=np.uint8))


def test_a_straddling_token_is_response(tokenizer):
    """ " the" with its space is one token; the border lies between the space and the word, which has to be learnt."""
    template = "{{ messages[0].content }} {% generation %}{{ messages[1].content }}{% endgeneration %}<|im_end|>"
    sample = tokenize(tokenizer, template, exchange("the", "the lazy"))
    assert response_texts(tokenizer, sample) == [" the lazy<|im_end|>"]


def test_pad_equal_to_end_of_turn_is_trained(tokenizer):
    assert tokenizer._tokenizer.pad_token_id == tokenizer.eos_id
    template = CHAT_TEMPLATES["generation"].replace("<|im_end|>\n", "<|endoftext|>")
    sample = tokenize(tokenizer, template, MULTI_TURN)
    ends = sample.tokens == tokenizer.eos_id
    assert sample.roles[ends].tolist() == [0, 0, 1, 0, 1]  # system, user, assistant, user, assistant


def test_content_that_merges_with_the_prompt(tokenizer):
    template = CHAT_TEMPLATES["plain"].replace("\n", " ")
    sample = tokenize(tokenizer, template, exchange("a", "the dog"))
    assert response_texts(tokenizer, sample) == [" the dog<|im_end|>"]


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
        tokenize_conversations(load_tokenizer(tmp_path), [Conversation(exchange("a", "b"))])


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


SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
    "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def test_the_first_word_of_sentencepiece_vocabularies_is_trained(tmp_path):
    """A word and the space before it are one token; the template writes the space before its marks."""
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path / "toy.model", vocab_size=120), SPACED)
    sample = tokenize(tokenizer, SPACED, exchange("how many", "the fox"))
    pieces = [tokenizer._model.id_to_piece(int(token)) for token in sample.tokens[sample.roles == 1]]
    assert "".join(pieces) == "▁the▁fox</s>"


def test_masks_are_those_of_transformers(tokenizer):
    """Where the marks hold the end of turn: `return_assistant_tokens_mask`, token for token."""
    template = CHAT_TEMPLATES["llama3_generation"]
    for messages in random_conversations(30):
        sample = tokenize(tokenizer, template, messages)
        theirs = tokenizer._tokenizer.apply_chat_template(
            messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        assert theirs["input_ids"] == sample.tokens.tolist()
        assert theirs["assistant_masks"] == sample.roles.tolist()


def weigh(tokenizer, template, conversation, **recipe):
    tokenizer.set_template(CHAT_TEMPLATES.get(template, template))
    (result,) = tokenize_conversations(tokenizer, [conversation], Recipe(**recipe))
    return result


@pytest.mark.parametrize("template", ["generation", "generation_newline", "plain", "llama3"])
def test_weights_of_messages(tokenizer, template):
    """0 is context, header and end of turn included; others reach every token of the message."""
    messages = [*exchange("a", "bad answer"), *exchange("b", "good answer"), *exchange("c", "dear answer")]
    weights = [
        MessageWeight(),
        MessageWeight(0.0),
        MessageWeight(),
        MessageWeight(),
        MessageWeight(),
        MessageWeight(2.5),
    ]
    sample = weigh(tokenizer, template, Conversation(messages, tuple(weights)))
    texts = [text.split("<")[0] for text in response_texts(tokenizer, sample)]
    assert texts == ["good answer", "dear answer"]
    assert sample.weights.dtype == np.float32 and set(sample.weights[sample.roles == 1]) == {1.0, 2.5}
    np.testing.assert_array_equal(sample.weights > 0, sample.roles == 1)
    runs = np.flatnonzero(sample.weights == 2.5)
    assert tokenizer._tokenizer.decode(sample.tokens[runs]).startswith("dear answer<|")
    alone = weigh(tokenizer, template, Conversation(messages, (MessageWeight(),) * 6))
    assert alone.weights is None and len(response_texts(tokenizer, alone)) == 3


def test_weights_of_spans(tokenizer):
    """A token in several spans takes the largest; the template strips the content, so characters move."""
    template = CHAT_TEMPLATES["generation"].replace("message['content'] }}", "message['content'] | trim }}")
    content = "  first part, then the rest"
    spans = ((2, 12, 0.5), (12, 18, 0.0))
    messages = exchange("a", content)
    sample = weigh(tokenizer, template, Conversation(messages, (MessageWeight(), MessageWeight(None, spans))))
    (encoding,) = tokenizer.encode_batch([text := tokenizer.render(messages).text])
    shift = text.index("first") - 2
    for start, stop, weight in [*spans, (18, len(content), 1.0)]:
        first, after = encoding.tokens_of(start + shift, stop + shift)
        assert sample.weights[after - 1 if weight == 1.0 else first] == weight
    assert sample.weights[sample.tokens == tokenizer.eos_id].size == 0 and sample.roles[-2] == 1  # its end of turn


def test_spans_that_leave_the_content_are_refused(tokenizer):
    conversation = Conversation(exchange("a", "abc"), (MessageWeight(), MessageWeight(None, ((0, 4, 0.5),))))
    assert "ends at character 4" in str(weigh(tokenizer, "generation", conversation))


def test_the_last_turn_only(tokenizer):
    conversation = Conversation([*exchange("a", "one"), *exchange("b", "two"), *exchange("c", "three")])
    for template in ("generation", "plain"):
        assert response_texts(tokenizer, weigh(tokenizer, template, conversation, turns="last")) == ["three<|im_end|>"]
    own = Conversation(conversation.messages, tuple(MessageWeight(1.0 if i == 1 else None) for i in range(6)))
    kept = weigh(tokenizer, "plain", own, turns="last")
    assert response_texts(tokenizer, kept) == ["one<|im_end|>", "three<|im_end|>"]


def test_the_weight_of_a_row_keeps_to_the_last_turn(tokenizer):
    row = {"messages": [*exchange("a", "the fox"), *exchange("c", "the dog")], "weight": 0.5}
    for turns, texts in (("last", ["the dog<|im_end|>"]), ("all", ["the fox<|im_end|>", "the dog<|im_end|>"])):
        sample = weigh(tokenizer, "plain", parse_row(row, Recipe(turns=turns)), turns=turns)
        assert response_texts(tokenizer, sample) == texts and set(sample.weights) == {0.0, 0.5}


def test_nothing_with_a_weight_is_refused(tokenizer):
    nothing = Conversation(exchange("a", "b"), (MessageWeight(0.0), MessageWeight(0.0)))
    for template in ("generation", "plain", None):
        assert "has weight 0" in str(weigh(tokenizer, template, nothing))


QUESTION = {"role": "user", "content": "c"}
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "OPEN{% endif %}"
)


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "opened"])
def test_thinking_weight(tokenizer, opened):
    """Up to the closing tag and the spaces after it, also where the generation prompt has begun it."""
    template = THINKING.replace("OPEN", "<think>\n" if opened else "")
    said = {"role": "assistant", "content": "the dog", "reasoning_content": "a fox </thin or a dog"}
    conversation = Conversation([*exchange("a", "b"), {"role": "user", "content": "c"}, said])
    whole = weigh(tokenizer, template, conversation)
    assert whole.weights is None
    end = "a fox </thin or a dog\n</think>\n\nthe dog<|im_end|>"
    assert response_texts(tokenizer, whole) == ["b<|im_end|>", end if opened else "<think>\n" + end]
    none = weigh(tokenizer, template, conversation, thinking_weight=0.0)
    assert none.weights is None and response_texts(tokenizer, none) == ["b<|im_end|>", "the dog<|im_end|>"]
    half = weigh(tokenizer, template, conversation, thinking_weight=0.5)
    thought = tokenizer._tokenizer.decode(half.tokens[half.weights == 0.5])
    assert thought == ("" if opened else "<think>\n") + "a fox </thin or a dog\n</think>\n\n"
    weighted = Conversation(conversation.messages, (*[MessageWeight()] * 3, MessageWeight(3.0)))
    product = weigh(tokenizer, template, weighted, thinking_weight=0.5)
    assert set(product.weights[product.roles == 1]) == {1.0, 1.5, 3.0}
    plain = weigh(tokenizer, "plain", Conversation(MULTI_TURN), thinking_weight=0.0)
    assert len(response_texts(tokenizer, plain)) == 2


def test_weights_of_thinking(tokenizer):
    """The row's own wins over the message's weight, and --thinking_weight multiplies it."""
    said = {"role": "assistant", "content": "the dog", "reasoning_content": "a fox"}
    template = THINKING.replace("OPEN", "")

    def weights(weight, **recipe):
        """Text of each weight, and what is trained."""
        conversation = Conversation([QUESTION, said], (MessageWeight(), weight))
        sample = weigh(tokenizer, template, conversation, **recipe)
        given = sample.roles.astype(float) if sample.weights is None else sample.weights
        return {
            value: tokenizer._tokenizer.decode(sample.tokens[given == value]) for value in {*given.tolist()} - {0.0}
        }

    thought, answer = "<think>\na fox\n</think>\n\n", "the dog<|im_end|>"
    assert weights(MessageWeight(None, (), 0.0)) == {1.0: answer}
    assert weights(MessageWeight(0.0, (), 1.0)) == {1.0: thought}
    assert weights(MessageWeight(3.0, (), 0.5)) == {0.5: thought, 3.0: answer}
    assert weights(MessageWeight(3.0, (), 0.5), thinking_weight=0.5) == {0.25: thought, 3.0: answer}
    assert weights(MessageWeight(None, ((0, 3, 2.0),), 0.5)) == {0.5: thought, 2.0: "the", 1.0: " dog<|im_end|>"}


def test_thinking_without_an_opening_tag(tokenizer):
    sample = weigh(tokenizer, "plain", Conversation(exchange("a", "a fox\n</think>\n\nthe dog")), thinking_weight=0.0)
    assert response_texts(tokenizer, sample) == ["the dog<|im_end|>"]


def test_thinking_in_unknown_tags_has_no_weight_of_its_own(tokenizer):
    said = {"role": "assistant", "content": "the dog", "reasoning_content": "a fox"}
    template = THINKING.replace("OPEN", "").replace("think>", "ponder>")
    conversation = Conversation([QUESTION, said])
    bad = weigh(tokenizer, template, conversation, thinking_weight=0.0)
    assert isinstance(bad, BadRow) and "in none of the tags that are known" in str(bad)
    assert response_texts(tokenizer, weigh(tokenizer, template, conversation))[0].endswith("the dog<|im_end|>")


def test_thinking_that_was_cut_off_is_all_thinking(tokenizer):
    turns = [*exchange("a", "<think>\na fox or a"), *exchange("c", "the dog")]
    half = weigh(tokenizer, "plain", Conversation(turns), thinking_weight=0.5)
    assert tokenizer._tokenizer.decode(half.tokens[half.weights == 0.5]) == "<think>\na fox or a<|im_end|>"
    none = weigh(tokenizer, "plain", Conversation(turns), thinking_weight=0.0)
    assert response_texts(tokenizer, none) == ["the dog<|im_end|>"]
    nothing = weigh(tokenizer, "plain", Conversation(turns[:2]), thinking_weight=0.0)
    assert isinstance(nothing, BadRow) and "nothing to learn" in str(nothing)


def test_plain_text_has_weights(tokenizer):
    conversation = Conversation(exchange("a", "the lazy dog"), (MessageWeight(), MessageWeight(2.0, ((0, 3, 0.0),))))
    sample = weigh(tokenizer, None, conversation)
    assert response_texts(tokenizer, sample) == [" lazy dog<|endoftext|>"] and sample.weights[-1] == 2.0


def test_notes(tokenizer):
    """What nobody would see: an answer without an end, and contents that become special tokens."""
    template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n"
    endless = template.replace("{% endfor %}", "{% endfor %}{% if add_generation_prompt %}") + "{% endif %}"
    sample = tokenize(tokenizer, endless, exchange("Hi", "Hello"))
    assert response_texts(tokenizer, sample) == ["Hello\n\n"] and sample.notes == (NO_END,)
    assert tokenize(tokenizer, "plain", exchange("Hi", "Hello")).notes == ()
    for name in ("plain", "generation", "generation_newline"):
        sample = tokenize(tokenizer, name, exchange("Hi", "use <|im_end|> to stop"))
        assert response_texts(tokenizer, sample) == ["use <|im_end|> to stop<|im_end|>"]
        assert sample.notes == (SPECIAL_IN_CONTENT,)


def test_template_arguments(tokenizer):
    """The row's win over the recipe's, and neither has a name of ours."""
    template = CHAT_TEMPLATES["plain"].replace("{% for", "{{ mood }}{% for", 1)
    conversation = Conversation(exchange("a", "b"))
    told = weigh(tokenizer, template, conversation, template_arguments={"mood": "calm"})
    assert tokenizer._tokenizer.decode(told.tokens).startswith("calm<|im_start|>")
    own = Conversation(conversation.messages, template_arguments={"mood": "wild"})
    told = weigh(tokenizer, template, own, template_arguments={"mood": "calm"})
    assert tokenizer._tokenizer.decode(told.tokens).startswith("wild<|im_start|>")
    shadowing = Conversation(conversation.messages, template_arguments={"messages": []})
    assert "'messages' is a name of the conversation" in str(weigh(tokenizer, template, shadowing))
    with pytest.raises(ValueError, match="'tools' is a name of the conversation"):
        weigh(tokenizer, template, conversation, template_arguments={"tools": []})


CALLING = CHAT_TEMPLATES["plain"].replace(
    "message['content'] + '<|im_end|>\n' }}",
    "message['content'] }}{% for c in message.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n",
)


def test_long_conversations_are_read_once(tokenizer, monkeypatch):
    """Every turn costs the same: the whole is encoded once, and few conversations are rendered besides it."""
    encoded, rendered = [], []
    encode, render = type(tokenizer).encode_batch, type(tokenizer).render
    monkeypatch.setattr(
        type(tokenizer), "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    monkeypatch.setattr(
        type(tokenizer),
        "render",
        lambda self, messages, *a, **k: rendered.append(messages) or render(self, messages, *a, **k),
    )
    for number in (10, 100):
        encoded.clear()
        rendered.clear()
        messages = []
        for turn in range(number):  # texts, numbers and booleans of which none is as the one before
            arguments = {"where": f"city {turn}", "days": turn, "far": turn % 2 == 0, "share": turn / 7}
            call = {"function": {"name": "look", "arguments": arguments}}
            messages += exchange("a", "") + [{"role": "tool", "content": "rain"}]
            messages[-2]["tool_calls"] = [call]
            messages.append({"role": "assistant", "content": "it rains"})
        sample = tokenize(tokenizer, CALLING, messages)
        assert len(response_texts(tokenizer, sample)) == 2 * number
        assert len(encoded) == 1 and len(rendered) <= 10
