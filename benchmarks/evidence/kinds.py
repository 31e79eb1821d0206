"""Kinds of tokens in answers: digits, operators, words, and the rest."""

from functools import lru_cache

import numpy as np

KINDS = ("digits", "operators", "words", "other")


def kind_of_tokens(tokens: np.ndarray, tokenizer: str) -> np.ndarray:
    """The kind of each token, as text [n]; tokens int [n]."""
    return _table(tokenizer)[tokens]


@lru_cache(maxsize=2)
def _table(tokenizer: str) -> np.ndarray:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return np.array([_kind(loaded.decode([token])) for token in range(len(loaded))])


def _kind(text: str) -> str:
    bare = text.strip()
    if bare.isdigit():
        return "digits"
    if bare and all(letter in "+-*/=<>x×÷%$." for letter in bare) and bare not in {".", "x"}:
        return "operators"
    return "words" if bare.isalpha() else "other"
