"""What is remembered of conversations of one shape gives the samples that each conversation gives alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_sstoken.data.text.masks as masks
import megatron_sstoken.data.text.rendering as rendering
from megatron_sstoken.data.conversation import BadRow, Conversation, MessageWeight
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.template_styles import STYLES
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_sentencepiece, make_tokenizer

MARKED_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}Bot: {{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}User: {{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}"
)
TRIMMED = CHAT_TEMPLATES["llama3_generation"].replace("message['content']", "message['content'] | trim")
LOOKS = CHAT_TEMPLATES["generation"].replace(
    "{{ message['content'] }}", "{{ message['content'] | replace('7', 'seven') }}"
)
MARKS_SOME = CHAT_TEMPLATES["generation"].replace("== 'assistant'", "== 'assistant' and 'a' in message['content']")
TEMPLATES = {
    **CHAT_TEMPLATES,
    **STYLES,
    "marked header": MARKED_HEADER,
    "trimmed": TRIMMED,
    "looks": LOOKS,
    "marks some": MARKS_SOME,
}
PARTS = {
    "bytes": {},
    "prefix space": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
    "NFC": {"normalizer": {"type": "NFC"}},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "Metaspace": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    },
}
LACKING = {"lacks some bytes": "©Ł", "lacks the line's end": "Ċ"}
"""Bytes, as their tokens have them, that the vocabulary has no token for: the tokenizer leaves them out, as SmolLM2's does."""
FLAGS = {"strips left": {"lstrip": True}, "strips right": {"rstrip": True}, "normalized": {"normalized": True}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers by name."""
    found = {}
    for name in (*PARTS, *FLAGS, *LACKING):
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        make_tokenizer(folder, chat_template=None, bos_token="<|begin_of_text|>")
        content = json.loads((folder / "tokenizer.json").read_text())
        content |= PARTS.get(name, {})
        _leave_out(content["model"], LACKING.get(name, ""))
        content["added_tokens"] = [token | FLAGS.get(name, {}) for token in content["added_tokens"]]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        settings_file = folder / "tokenizer_config.json"
        settings_file.write_text(json.dumps(_with_flags(json.loads(settings_file.read_text()), FLAGS.get(name, {}))))
        found[name] = load_tokenizer(folder)
    found["sentencepiece"] = load_tokenizer(make_sentencepiece(tmp_path_factory.mktemp("spm") / "toy.model"))
    return found


def _leave_out(model, characters):
    model["vocab"] = {token: number for token, number in model["vocab"].items() if not {*token} & {*characters}}
    model["merges"] = [pair for pair in model["merges"] if not {*"".join(pair)} & {*characters}]


def _with_flags(config, flags):
    added = config.get("added_tokens_decoder", {})
    return config | ({"added_tokens_decoder": {key: token | flags for key, token in added.items()}} if added else {})


words = st.sampled_from(
    ["the fox", "7", " ", "\n", "\n\n  ", "a", "é", "e\u0301", "\u0301", "<|im_end|>", "<|im_", "end|>", "<think>", "</think>",
     "<think>\nso\n</think>\n\n", "Bot: ", "assistant\n", "Xq0Z", "😀", "\ud800", "/no_think", "</s>"]
)  # fmt: skip
usual = st.sampled_from(["the fox", "7", "a", " the", "is 7\n", "lazy", "\n\n  dog", "é"])
contents = st.one_of(usual, usual, st.lists(words, max_size=4).map("".join), st.text(max_size=6))
weights = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]))


@st.composite
def batches(draw):
    """Conversations, of few shapes."""
    shapes = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 2)), min_size=1, max_size=2))
    conversations = []
    for system, turns in draw(st.lists(st.sampled_from(shapes), min_size=2, max_size=5)):
        messages = [message for _ in range(turns) for message in exchange(draw(contents), draw(contents))]
        messages = [{"role": "system", "content": draw(contents)}] * system + messages
        weight = tuple(
            MessageWeight(draw(weights), thinking=draw(weights)) if m["role"] == "assistant" else MessageWeight()
            for m in messages
        )
        conversations.append(Conversation(messages, weights=weight if draw(st.integers(0, 3)) == 0 else ()))
    return conversations


def same(one, other):
    """Whether two results are equal."""
    if isinstance(one, BadRow) or isinstance(other, BadRow):
        return str(one) == str(other) and type(one) is type(other)
    return one.notes == other.notes and all(
        np.array_equal(getattr(one, name), getattr(other, name)) if getattr(one, name) is not None
        else getattr(other, name) is None
        for name in ("tokens", "roles", "weights")
    )  # fmt: skip


@pytest.mark.parametrize("name", [*PARTS, *FLAGS, *LACKING, "sentencepiece"])
@settings(max_examples=60)
@given(template=st.sampled_from([*TEMPLATES]), batch=batches(), thinking=st.sampled_from([1.0, 1.0, 0.0]))
def test_the_same_as_alone(tokenizers, name, template, batch, thinking):
    tokenizer, recipe = tokenizers[name], Recipe(thinking_weight=thinking)
    alone = []
    for conversation in batch:
        tokenizer.set_template(TEMPLATES[template])  # forgets
        alone += tokenize_conversations(tokenizer, [conversation], recipe)
    tokenizer.set_template(TEMPLATES[template])
    for _ in range(2):
        together = tokenize_conversations(tokenizer, batch, recipe)
        assert [same(*pair) for pair in zip(alone, together, strict=True)] == [True] * len(batch)


@pytest.mark.parametrize("name", ["bytes", "lacks some bytes"])
@pytest.mark.parametrize("template", ["plain", "generation", "llama3", "trimmed", "thinking last"])
def test_what_is_known_is_used(tokenizers, monkeypatch, name, template):
    """Neither a second rendering nor positions for conversations like the first, whatever spaces their texts have."""
    tokenizer = tokenizers[name]
    tokenizer.set_template(TEMPLATES[template])
    tokenize_conversations(tokenizer, [Conversation(exchange("the fox", "a dog"))])

    def refuse(*_):
        raise AssertionError("not known")

    monkeypatch.setattr(rendering, "read_rendering", refuse)
    monkeypatch.setattr(masks, "_by_positions", refuse)
    texts = ["7", "the lazy dog", "  the fox\n", "é 😀"]
    samples = tokenize_conversations(tokenizer, [Conversation(exchange(one, two)) for one in texts for two in texts])
    assert all(sample.roles.any() for sample in samples)


def test_a_content_like_the_header_is_no_header(tokenizers):
    """Marks hold the header of some templates; what the assistant says after it may begin like it."""
    tokenizer = tokenizers["bytes"]
    tokenizer.set_template(MARKED_HEADER.replace("Bot: {{", "{{"))
    (sample,) = tokenize_conversations(tokenizer, [Conversation(exchange("the", "Bot: the fox"))])
    trained = tokenizer.decode(sample.tokens[sample.roles == 1])
    assert trained == "Bot: the fox<|im_end|>"


def test_shapes_are_bounded(tokenizers, monkeypatch):
    tokenizer = tokenizers["bytes"]
    tokenizer.set_template(CHAT_TEMPLATES["plain"])
    monkeypatch.setattr(rendering, "MOST_SHAPES", 2)
    chats = [Conversation([turn for _ in range(number) for turn in exchange("a", "7")]) for number in range(1, 5)]
    assert all(sample.roles.any() for sample in tokenize_conversations(tokenizer, chats))
    assert len(tokenizer.shapes) == 2


def test_a_border_inside_of_a_text_is_not_remembered(tokenizers):
    """A mark that begins in the middle of what the assistant says."""
    tokenizer = tokenizers["bytes"]
    said = "{{ message['content'][:2] }}{% generation %}{{ message['content'][2:] }}"
    tokenizer.set_template(CHAT_TEMPLATES["generation"].replace("{% generation %}{{ message['content'] }}", said))
    chat = Conversation(exchange("the fox", "  the dog"))
    assert len(tokenize_conversations(tokenizer, [chat, chat])) == 2
