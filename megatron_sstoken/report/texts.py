"""Texts of tokens by their ids: from the records themselves, from the tokenizer, or the ids where neither is there."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.report.record_files import TEXT, RecordFile, batches

Find: TypeAlias = Callable[[np.ndarray], dict[int, str]]
"""Ids → texts of those that it knows."""
_BYTES = re.compile(r"(?:\\x[0-9a-f]{2})+")


GROUPS = ("digits", "operators", "words", "other")
_SPECIAL = re.compile(r"<[^<>\s]+>")  # <|im_end|>, </s>


class Texts:
    """Looks up texts, each once; `is_known`: there are texts at all."""

    def __init__(self, find: Find | None):
        self._find = find
        self._known: dict[int, str] = {}

    @property
    def is_known(self) -> bool:
        return self._find is not None

    def of(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """A text for each id; `#17` where there is none."""
        wanted = np.unique(np.asarray(ids, dtype=np.int64))
        new = np.array([one for one in wanted.tolist() if one not in self._known], dtype=np.int64)
        if new.size:
            found = self._find(new) if self._find else {}
            self._known.update((one, found.get(one, f"#{one}")) for one in new.tolist())
        return [self._known[one] for one in np.asarray(ids).tolist()]


def texts_in_records(files: Sequence[RecordFile]) -> Texts:
    """Those that the records hold."""
    with_text = [file for file in files if TEXT in file.columns]
    return Texts((lambda ids: _in_records(with_text, ids)) if with_text else None)


def texts_of_tokenizer(path: str | Path) -> Texts:
    """Those of a tokenizer. ValueError for one that cannot be read."""
    # Imported here: takes seconds, and 200 MB, which nobody need spend whose records have texts.
    from megatron_sstoken.data.token_text import TokenTexts
    from megatron_sstoken.data.tokenizer_files import load_tokenizer

    return Texts(_each(TokenTexts(load_tokenizer(path)).one))


def texts_of_prepared(manifest: StoreManifest, others: Iterable[str | None]) -> Texts:
    """Those of the tokenizer that data was prepared with. ValueError where it is not found, there or at `others`."""
    from megatron_sstoken.data.token_text import texts_of_data  # as above

    return Texts(_each(texts_of_data(manifest, others).one))


def _each(text_of: Callable[[int], str]) -> Find:
    return lambda ids: {one: text_of(one) for one in ids.tolist()}


def _in_records(files: Iterable[RecordFile], ids: np.ndarray) -> dict[int, str]:
    """Reads until all ids are found."""
    found: dict[int, str] = {}
    missing = np.zeros(int(ids.max()) + 1, dtype=bool)
    missing[ids] = True
    for file in files:
        for batch in batches(file, ["token", TEXT]):
            learn(found, missing, batch.column("token").to_numpy(), batch.column(TEXT))
            if not missing.any():
                return found
    return found


def learn(found: dict[int, str], missing: np.ndarray, tokens: np.ndarray, texts: pa.Array) -> None:
    """Enter the texts of those `tokens` that `missing`, bool [ids], names, and strike them out there."""
    here = np.flatnonzero((tokens < len(missing)) & missing[np.minimum(tokens, len(missing) - 1)])
    if not here.size:
        return
    ids, first = np.unique(tokens[here], return_index=True)
    for one, text in zip(ids.tolist(), texts.take(pa.array(here[first])).to_pylist(), strict=True):
        if text is not None:
            found[one] = str(text)
            missing[one] = False


def group_of(text: str) -> str:
    """Of `GROUPS`: a token with a letter is a word; without one, digits if it has any, else operators if it has one."""
    plain = text.strip()
    if _BYTES.fullmatch(plain) or _SPECIAL.fullmatch(plain):
        return "other"
    if any(map(str.isalpha, plain)):
        return "words"
    if any(map(str.isdigit, plain)):
        return "digits"
    is_operator = any(character in "+-*/%^&|~=<>" or unicodedata.category(character) == "Sm" for character in plain)
    return "operators" if is_operator else "other"


def joined(texts: Iterable[str]) -> str:
    """The text that tokens make together; those that are bytes become characters where they are whole ones together."""
    pieces: list[str] = []
    held = b""
    for text in texts:
        if _BYTES.fullmatch(text):
            held += bytes.fromhex(text.replace("\\x", ""))
            continue
        if held:
            pieces.append(held.decode(errors="replace"))
            held = b""
        pieces.append(text)
    if held:
        pieces.append(held.decode(errors="replace"))
    return "".join(pieces)
