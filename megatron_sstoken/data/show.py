"""Samples of a prepared folder as text, with what is trained on marked."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.tokenizer import TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
REPLACEMENT = "\ufffd"
SHOWN = "\n\t\u200c\u200d"  # line breaks, tabs, and what joins letters and emoji


def show(path: str | Path, number: int, *, tokenizer: str | Path | None = None, colour: bool = False) -> Iterator[str]:
    """Texts of `number` samples spread evenly over a prepared folder, one at a time.

    What is trained on stands in « », or is green with `colour`; «0.5| » has a weight other than 1. `tokenizer`: default, the
    one that the data was prepared with. ValueError for a folder that is not prepared, or another tokenizer.
    """
    store = SampleStore(path)
    loaded = _tokenizer_of(store, tokenizer)
    for index in np.unique(np.linspace(0, len(store) - 1, min(number, len(store))).round().astype(int)).tolist():
        yield f"{_heading(store, index)}\n{_text(store, index, loaded, colour)}"


def _tokenizer_of(store: SampleStore, path: str | Path | None) -> TextTokenizer:
    manifest = store.manifest
    loaded = load_tokenizer(path or manifest.tokenizer_path)
    if loaded.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"--tokenizer: {loaded.path} is another one than {store.path} was prepared with ({manifest.tokenizer_path}): "
            "name that one"
        )
    return loaded


def _heading(store: SampleStore, index: int) -> str:
    weights = store.weights(index)
    trained = weights[1:][weights[1:] > 0]
    label = store.manifest.labels[store.labels[index]] if store.manifest.labels else ""
    text = f"── sample {index} (input row {store.rows[index]}{', ' + label if label else ''}): "
    text += f"{len(weights):,} tokens, {len(trained):,} trained on"
    if len(trained) and (trained != 1).any():
        low, high = trained.min(), trained.max()
        text += f" at weight {low:g}" if low == high else f" at weights {low:g} to {high:g}"
    return text


def _text(store: SampleStore, index: int, tokenizer: TextTokenizer, colour: bool) -> str:
    tokens, weights = store.tokens(index).tolist(), store.weights(index)
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(tokens)]
    pieces = []
    for start, piece in zip(borders, decoded_pieces(tokenizer, tokens, borders), strict=False):
        weight = float(weights[start])
        piece = _printable(piece)
        if not weight:
            pieces.append(f"{DIM}{piece}{PLAIN}" if colour else piece)
            continue
        marked = piece if weight == 1 else f"{weight:g}|{piece}"
        pieces.append(f"{GREEN}{marked}{PLAIN}" if colour else f"«{marked}»")
    return "".join(pieces)


def decoded_pieces(tokenizer: TextTokenizer, tokens: list[int], borders: list[int]) -> Iterator[str]:
    """Text of the tokens between consecutive `borders`, the first 0.

    Each is what the text grows by, as tokenizers join pieces with spaces that they leave out at the start. A character whose
    bytes lie on both sides of a border belongs to the piece where it is whole.
    """
    before = ""
    for stop in borders[1:]:
        text = tokenizer.decode(tokens[:stop])
        whole = text.rstrip(REPLACEMENT) if stop < len(tokens) else text
        yield whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens[:stop])[len(before) :]
        before = whole


def _printable(text: str) -> str:
    """Control characters as escapes: data must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or c == " " else c.encode("unicode_escape").decode() for c in text
    )
