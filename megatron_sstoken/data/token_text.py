"""The text of single tokens, for people who read token records."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.data.tokenizer import TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer

TEXT_TYPE = pa.dictionary(pa.int32(), pa.string())
"""Arrow's type of a column of texts: each text is stored once."""


class TokenTexts:
    """Texts of the tokens of a vocabulary.

    Those of the tokens of a text, joined, are the text, where every token holds whole characters. Of one that does not, bytes
    are written: `\\xe2\\x80`, two lower-case hexadecimal digits each. A backslash of the text itself stays as it is.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def one(self, token: int) -> str:
        """Text of a token; empty where the vocabulary has none."""
        token = int(token)
        if token not in self._known:
            self._known[token] = text_of(self._tokenizer.token_bytes(token))
        return self._known[token]

    def of(self, tokens: np.ndarray) -> pa.DictionaryArray:
        """Texts of tokens, int [n]: an array of `TEXT_TYPE`."""
        distinct, places = np.unique(tokens, return_inverse=True)
        texts = pa.array([self.one(token) for token in distinct.tolist()], pa.string()).dictionary_encode()
        indices = texts.indices.to_numpy()[places] if distinct.size else np.empty(0, np.int32)
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), texts.dictionary)


def texts_of_data(manifest: StoreManifest, others: Iterable[str | None] = ()) -> TokenTexts:
    """Texts of the tokens of prepared data, by the tokenizer that it was prepared with.

    It is looked for where it was then, and at `others`. Raises ValueError, which says why, where it is not found.
    """
    reasons = []
    for path in dict.fromkeys(filter(None, [manifest.tokenizer_path, *others])):
        if not Path(path).exists():
            reasons.append(f"{path} does not exist")
            continue
        try:
            tokenizer = load_tokenizer(path)
        except ValueError:
            reasons.append(f"{path} holds none that can be read")
            continue
        if tokenizer.fingerprint == manifest.tokenizer_fingerprint:
            return TokenTexts(tokenizer)
        reasons.append(f"{path} is another one")
    raise ValueError(f"the tokenizer that the data was prepared with is not found: {'; '.join(reasons)}: put it there")


def text_of(piece: bytes) -> str:
    """The characters that the bytes are, or, where they are not whole ones, the bytes themselves as `\\xe2\\x80`."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
