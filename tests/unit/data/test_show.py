"""Samples as text, with what is trained on marked."""

import numpy as np
import pytest

from megatron_sstoken.data.show import decoded_pieces, show
from megatron_sstoken.data.store import StoreWriter
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.toy import make_sentencepiece, make_tokenizer


@pytest.fixture(params=["hugging_face", "sentencepiece"])
def tokenizer(request, tmp_path):
    if request.param == "sentencepiece":
        return load_tokenizer(make_sentencepiece(tmp_path / "toy.model"))
    make_tokenizer(tmp_path / "toy", chat_template=None)
    return load_tokenizer(tmp_path / "toy")


def write(folder, tokenizer, samples):
    """Samples of (text, weight) pieces."""
    with StoreWriter(folder) as writer:
        for row, pieces in enumerate(samples):
            ids = [tokenizer.encode_batch([text])[0].ids for text, _ in pieces]
            weights = np.concatenate(
                [np.full(len(one), w, np.float32) for one, (_, w) in zip(ids, pieces, strict=True)]
            )
            tokens = np.concatenate([np.array(one, np.int32) for one in ids])
            writer.add(tokens, (weights > 0).astype(np.uint8), row, weights=weights, label="toy")
        writer.finalize(
            vocabulary_size=tokenizer.vocabulary_size, eos_token_id=None, template=None,
            tokenizer_fingerprint=tokenizer.fingerprint, tokenizer_path=tokenizer.path,
        )  # fmt: skip
    return folder


def test_what_is_trained_on_is_marked(tokenizer, tmp_path):
    samples = [[("the fox", 0), ("the dog", 1)], [("how", 0), ("many", 0.5), ("apples", 1), ("the", 0)]]
    first, second = show(write(tmp_path / "data", tokenizer, samples), 5)
    heading, text = first.split("\n")
    assert "sample 0 (input row 0, toy)" in heading and "trained on" in heading and "weight" not in heading
    assert text.replace(" ", "") == "thefox«thedog»"  # sentencepiece puts a space before each piece
    heading, text = second.split("\n")
    assert heading.endswith("at weights 0.5 to 1") and text.replace(" ", "") == "how«0.5|many»«apples»the"


def test_samples_are_spread_over_the_folder(tokenizer, tmp_path):
    samples = [[("the", 0), ("dog", 1)]] * 11
    folder = write(tmp_path / "data", tokenizer, samples)
    assert [int(text.split()[2]) for text in show(folder, 3)] == [0, 5, 10]
    assert len(list(show(folder, 100))) == 11


def test_colours_of_a_terminal_and_escapes_of_data(tmp_path):
    make_tokenizer(tmp_path / "toy", chat_template=None)
    tokenizer = load_tokenizer(tmp_path / "toy")
    (text,) = show(write(tmp_path / "data", tokenizer, [[("a\x1b[2J\n", 0), ("b", 1)]]), 1, colour=True)
    assert "\x1b[2J" not in text and "\\x1b[2J\n" in text and "\x1b[32mb\x1b[0m" in text and "«" not in text


def test_a_character_on_both_sides_of_a_border_is_whole(tmp_path):
    make_tokenizer(tmp_path / "toy", chat_template=None)
    tokenizer = load_tokenizer(tmp_path / "toy")
    ids = tokenizer.encode_batch(["aé"])[0].ids
    assert len(ids) == 3  # é is two bytes
    assert list(decoded_pieces(tokenizer, ids, [0, 2, 3])) == ["a", "é"]


def test_another_tokenizer_is_refused(tmp_path):
    for name, eos in (("one", "<|endoftext|>"), ("two", "<|im_end|>")):
        make_tokenizer(tmp_path / name, chat_template=None, eos_token=eos)
    folder = write(tmp_path / "data", load_tokenizer(tmp_path / "one"), [[("a", 0), ("b", 1)]])
    with pytest.raises(ValueError, match="--tokenizer: .*two is another one than .* was prepared with .*one"):
        list(show(folder, 1, tokenizer=tmp_path / "two"))
