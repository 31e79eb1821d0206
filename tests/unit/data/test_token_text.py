"""Texts of single tokens: joined they are the text, and parts of characters are told as their bytes."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sstoken.data.text.pieces import ALPHABET
from megatron_sstoken.data.token_text import TEXT_TYPE, TokenTexts
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.toy import SENTENCES, SPECIAL_TOKENS, make_sentencepiece, make_tokenizer

BYTES = re.compile(r"(\\x[0-9a-f]{2})+")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\\xeé😀the<|>"), max_size=40)


def joined(texts: list[str]) -> bytes:
    """The bytes that the texts of tokens stand for, where no token's text looks like bytes by chance."""
    return b"".join(bytes.fromhex(one.replace("\\x", "")) if BYTES.fullmatch(one) else one.encode() for one in texts)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """A Hugging Face tokenizer as Llama 2's: spaces as ▁, unknown characters as bytes."""
    folder = tmp_path_factory.mktemp("byte_fallback")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *every_byte], show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]  # bytes are entries like any other
    plain = Tokenizer.from_str(json.dumps(content))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)
    return load_tokenizer(folder)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_texts_of_byte_level_tokens(byte_level, text):
    (encoding,) = byte_level.encode_batch([text])
    texts = [TokenTexts(byte_level).one(token) for token in encoding.ids]
    if not any(BYTES.search(one) for one in texts):
        assert "".join(texts) == text  # whole characters
    if "\\x" not in text:
        assert joined(texts) == text.encode()


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from(" theqickbrown"), min_size=1, max_size=30))
def test_texts_of_sentencepiece_tokens(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "texts.model"
    if not path.exists():
        make_sentencepiece(path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    tokenizer = load_tokenizer(path)
    (encoding,) = tokenizer.encode_batch([text])
    assert "".join(map(TokenTexts(tokenizer).one, encoding.ids)) == " " + text  # the space is put before every text
    (unknown,) = tokenizer.encode_batch(["q€"])
    assert "".join(map(TokenTexts(tokenizer).one, unknown.ids)) == " q ⁇ "


def test_the_alphabet_is_that_of_tokenizers():
    assert {*ALPHABET} == {*pre_tokenizers.ByteLevel.alphabet()} and sorted(ALPHABET.values()) == [*range(256)]
    ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\x00 é\xad🙂")
    assert bytes(ALPHABET[character] for character in piece) == "\x00 é\xad🙂".encode()


def test_parts_of_characters_are_bytes(byte_level):
    texts = TokenTexts(byte_level)
    (encoding,) = byte_level.encode_batch(["€\\xe2<|im_end|>"])
    parts = [*map(texts.one, encoding.ids)]
    assert parts == ["\\xe2", "\\x82", "\\xac", "\\", "x", "e", "2", "<|im_end|>"]
    assert [texts.one(token) for token in sorted(byte_level.special_ids)] == [*SPECIAL_TOKENS]
    assert texts.one(byte_level.vocabulary_size + 5) == ""


def test_texts_with_byte_fallback(byte_fallback):
    (encoding,) = byte_fallback.encode_batch(["the lazy €"])
    texts = [*map(TokenTexts(byte_fallback).one, encoding.ids)]
    assert texts[-3:] == ["\\xe2", "\\x82", "\\xac"] and "".join(texts[:-3]) == "the lazy "


def test_a_column_holds_each_text_once(byte_level):
    texts = TokenTexts(byte_level)
    tokens = np.array([5, 70, 5, 5, 70], dtype=np.int32)
    column = texts.of(tokens)
    assert column.type == TEXT_TYPE and len(column.dictionary) == 2
    assert column.to_pylist() == [texts.one(token) for token in tokens]
    assert texts.of(tokens[:0]).to_pylist() == [] and texts.of(tokens[:0]).type == pa.dictionary(
        pa.int32(), pa.string()
    )
