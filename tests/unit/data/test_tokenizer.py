"""The two kinds of tokenizers, and where generation marks may stand."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.text.marks import has_generation_marks
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer_files import load_tokenizer
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


def test_tokens_of_characters(folder):
    text = "the lazy dog 😀 é <|im_end|>\n"
    (encoding,) = load_tokenizer(folder).encode_batch([text])
    offsets = load_tokenizer(folder)._tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            holding = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
            assert encoding.tokens_of(start, stop) == (holding[0], holding[-1] + 1)


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
    assert encoding.tokens_of(0, len("the  dog")) == (0, len(parts[0]))
    assert encoding.tokens_of(len("the  dog"), len("the  dog</s><s>")) == (len(parts[0]), len(parts[0]) + 2)
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


def bounds(tokenizer, text):
    """Characters of each token, by asking for each character alone."""
    (encoding,) = tokenizer.encode_batch([text])
    ranges = [encoding.tokens_of(char, char + 1) for char in range(len(text))]
    assert all(a <= b for a, b in ranges) and ranges[-1][1] <= len(encoding.ids)
    covered = set().union(*(range(a, b) for a, b in ranges))
    return encoding.ids, ranges, covered


def fast(tmp_path, model, **parts):
    """A folder with a tokenizer of these parts."""
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def test_a_post_processor_moves_no_border(folder, tmp_path):
    """One that trims spaces off the offsets of tokens: a lone space would have no character, and be context."""
    copy = shutil.copytree(folder, tmp_path / "trimming")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (copy / "tokenizer.json").write_text(json.dumps(content))
    text = "  the lazy dog  <|im_end|> 7 "
    ids, ranges, covered = bounds(load_tokenizer(copy), text)
    assert (ids, ranges, covered) == bounds(load_tokenizer(folder), text)
    assert covered == set(range(len(ids)))


def test_tokens_of_byte_fallback_and_of_a_prefix(tmp_path):
    """Several tokens for one character all hold it; what is put before a word is with the word."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = bytes_ | {"</s>": 256, "<unk>": 257, "▁": 258, "a": 259, "b": 260, "▁a": 261}
    model = models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = fast(tmp_path, model, normalizer=prefix)
    ids, ranges, covered = bounds(tokenizer, "b😀 a")
    assert ids == [258, 260, 0xF0, 0x9F, 0x98, 0x80, 261]
    assert ranges == [(0, 2), (2, 6), (6, 7), (6, 7)] and covered == set(range(7))


def test_tokens_of_normalized_characters(tmp_path):
    """NFKC makes two characters of one and one of two."""
    vocabulary = {"</s>": 0, "f": 1, "i": 2, "é": 3, "x": 4, "<unk>": 5}
    tokenizer = fast(tmp_path, models.BPE(vocabulary, [], unk_token="<unk>"), normalizer=normalizers.NFKC())
    ids, ranges, _ = bounds(tokenizer, "xﬁe\u0301x")
    assert ids == [4, 1, 2, 3, 4]
    assert ranges == [
        (0, 1),
        (1, 3),
        (3, 4),
        (4, 4),
        (4, 5),
    ]  # the accent is of the token before, which its letter is in


def test_sentencepiece_covers_every_character(tmp_path):
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path / "toy.model"))
    ids, ranges, covered = bounds(tokenizer, "the ﬁ fox é</s>a")
    assert covered == set(range(len(ids))) and all(a < b for a, b in ranges)


def test_rendering_with_tools_and_arguments(folder):
    tokenizer = load_tokenizer(folder, "{{ tools | length }}{{ mood }}{{ messages[0].content }}")
    chat = tokenizer.render(exchange("a", "b"), tools=[{"name": "f"}], arguments={"mood": "calm"})
    assert chat.text == "1calma"
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(BadRow, match=f"{name!r} is a name of the conversation itself"):
            tokenizer.render(exchange("a", "b"), arguments={name: 1})


def test_generation_prompt(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.generation_prompt(None, {}) == "<|im_start|>assistant\n"
    tokenizer.set_template(CHAT_TEMPLATES["plain"].partition("{% if add_generation_prompt %}")[0])
    assert tokenizer.generation_prompt(None, {}) == ""


def test_nothing_is_added_to_what_a_template_wrote(tmp_path):
    """A template writes bos; a tokenizer that adds its own would give two."""
    make_tokenizer(tmp_path, chat_template="llama3", bos_token="<|begin_of_text|>")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    begin = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|begin_of_text|>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [begin], "tokens": ["<|begin_of_text|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (sample,) = tokenize_conversations(load_tokenizer(tmp_path), [Conversation(exchange("a", "b"))])
    assert (sample.tokens == begin).sum() == 1
