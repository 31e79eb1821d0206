"""The two kinds of tokenizers, and where generation marks may stand."""

import json
import shutil

import pytest
from transformers import ByT5Tokenizer

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer import has_generation_marks, load_tokenizer
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_sentencepiece, make_tokenizer

MARK = "{% generation %}{{ x }}{% endgeneration %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def test_hugging_face_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer._tokenizer.get_vocab()
    assert tokenizer.marked and tokenizer.template == CHAT_TEMPLATES["generation"]
    assert tokenizer.eos_id == vocabulary["<|endoftext|>"] and tokenizer.bos_id is None
    assert tokenizer.end_of_turn_ids == {vocabulary[end] for end in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")}
    assert tokenizer.special_ids == {i for token, i in vocabulary.items() if token.startswith("<|")}
    assert tokenizer.vocabulary_size == len(vocabulary)


def test_truncation_and_padding_of_the_folder_are_ignored(folder, tmp_path):
    """A tokenizer.json saved after a training run often carries both."""
    copy = shutil.copytree(folder, tmp_path / "cut")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (copy / "tokenizer.json").write_text(json.dumps(content))
    whole, cut = load_tokenizer(folder), load_tokenizer(copy)
    text = "the quick brown fox jumps over the lazy dog"
    assert cut.encode_batch([text])[0].ids == whole.encode_batch([text])[0].ids
    assert cut.fingerprint == whole.fingerprint


def test_fingerprint_is_of_the_tokenisation_only(folder, tmp_path):
    moved = load_tokenizer(shutil.copytree(folder, tmp_path / "moved"), CHAT_TEMPLATES["plain"])
    assert moved.fingerprint == load_tokenizer(folder).fingerprint
    make_tokenizer(tmp_path / "other", vocab_size=300)
    assert load_tokenizer(tmp_path / "other").fingerprint != moved.fingerprint
    make_tokenizer(tmp_path / "eos", eos_token="<|im_end|>")
    assert load_tokenizer(tmp_path / "eos").fingerprint != moved.fingerprint


def test_tokens_before_counts_starts(folder):
    text = "the lazy dog 😀 é <|im_end|>\n"
    (encoding,) = load_tokenizer(folder).encode_batch([text])
    offsets = load_tokenizer(folder)._tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for char in range(len(text) + 1):
        assert encoding.tokens_before(char) == sum(start < char for start, _ in offsets)


def test_sentencepiece_tokenizer(tmp_path):
    path = make_sentencepiece(tmp_path / "toy.model", user_defined_symbols=["<|im_end|>"])
    tokenizer = load_tokenizer(path)
    model = tokenizer._model
    assert (tokenizer.bos_id, tokenizer.eos_id) == (model.bos_id(), model.eos_id())
    assert tokenizer.end_of_turn_ids == {model.eos_id(), model.piece_to_id("<|im_end|>")}
    assert tokenizer.vocabulary_size == model.get_piece_size() and tokenizer.template is None
    (encoding,) = tokenizer.encode_batch(["the  dog</s><s>a fox<|im_end|>"])
    parts = [model.encode("the  dog"), [model.eos_id(), model.bos_id()], model.encode("a fox<|im_end|>")]
    assert encoding.ids == [token for part in parts for token in part]
    assert encoding.tokens_before(len("the  dog")) == len(parts[0])
    assert encoding.tokens_before(len("the  dog</s><s>")) == len(parts[0]) + 2
    other = make_sentencepiece(tmp_path / "other.model", vocab_size=80)
    assert load_tokenizer(other).fingerprint != tokenizer.fingerprint


def test_tokenizer_without_offsets(tmp_path):
    """ByT5 is in Python; a token is a byte, so every character border is one of tokens."""
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    said = "{% generation %}{{ messages[1].content }}{{ eos_token }}{% endgeneration %}"
    template = "{{ messages[0].content }}:" + said
    tokenizer = load_tokenizer(tmp_path, template)
    (sample,) = tokenize_conversations(tokenizer, [Conversation(exchange("é", "ab"))])
    assert sample.roles.tolist() == [0, 0, 0, 1, 1, 1]
    assert sample.tokens[-1] == tokenizer.eos_id
    assert tokenizer.fingerprint == load_tokenizer(tmp_path).fingerprint


def test_border_unknown_without_offsets(tmp_path):
    """A template border inside what the tokenizer takes for one special token."""
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    template = "{{ messages[0].content }}</{% generation %}s>{{ messages[1].content }}{% endgeneration %}"
    (result,) = tokenize_conversations(load_tokenizer(tmp_path, template), [Conversation(exchange("a", "b"))])
    assert isinstance(result, BadRow) and "has no offsets" in str(result)


@pytest.mark.parametrize("name", ["absent", "file.txt", "empty"])
def test_paths_that_are_no_tokenizer(tmp_path, name):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"tokenizer: .*{name}"):
        load_tokenizer(tmp_path / name)


def test_damaged_sentencepiece_model(tmp_path):
    (tmp_path / "toy.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded as a sentencepiece model"):
        load_tokenizer(tmp_path / "toy.model")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_marks_are_found(name):
    assert has_generation_marks(CHAT_TEMPLATES[name]) == ("generation" in name)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro say(x) %}" + MARK + "{% endmacro %}{{ say(1) }}",
        "{% set said %}" + MARK + "{% endset %}{{ said }}",
        "{% filter trim %}" + MARK + "{% endfilter %}",
        "{% for x in messages recursive %}" + MARK + "{% endfor %}",
        "{% generation %}" + MARK + "{% endgeneration %}",
    ],
)
def test_marks_that_cannot_be_located_are_refused(template):
    with pytest.raises(ValueError, match="line 1: a generation mark inside a macro"):
        has_generation_marks(template)


def test_broken_template_is_refused(folder):
    with pytest.raises(ValueError, match="chat template: line 1"):
        load_tokenizer(folder, "{% for m in messages %}")
