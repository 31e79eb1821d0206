"""Tokenizers from their files: Hugging Face folders, fast or slow, and sentencepiece models."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from megatron_sstoken.data.conversation import BadRow, Span
from megatron_sstoken.data.text import pieces
from megatron_sstoken.data.text.finder import Finder
from megatron_sstoken.data.tokenizer import Encoding, TextTokenizer, pack_ids
from megatron_sstoken.folders import missing
from megatron_sstoken.garbage import without_collections

END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "</s>", "<|endoftext|>",
    "<|eom_id|>", "<eos>",
)  # fmt: skip


class HuggingFaceTokenizer(TextTokenizer):
    """A tokenizer folder in Hugging Face's format, fast or slow. Never runs code from the folder."""

    def __init__(self, path: str | Path, template: str | None = None):
        self.path = str(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises anything for files that it cannot read
            raise ValueError(
                f"tokenizer: {path} cannot be loaded as a Hugging Face tokenizer folder: {error}"
            ) from error
        self._tokenizer = tokenizer
        self._backend: tokenizers.Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # tokenizer.json may carry both; a sample must be neither cut nor filled up
            self._backend.no_truncation()
            self._backend.no_padding()
        self.special_tokens = dict(tokenizer.special_tokens_map)
        described = self._backend and self._backend.to_str()
        self.fingerprint = self._fingerprint(described)
        if self._backend is not None:
            # It adds special tokens, which nobody asks for, and may move the offsets of tokens off their spaces.
            self._backend.post_processor = tokenizers.processors.Sequence([])
        added = tokenizer.added_tokens_decoder
        known_ends = {token_id for token_id, token in added.items() if token.content in END_OF_TURN}
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.vocabulary_size = max(tokenizer.get_vocab().values()) + 1
        self.end_of_turn_ids = frozenset(known_ends if self.eos_id is None else known_ends | {self.eos_id})
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self.specials = Finder.of(tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))
        self.end_pattern = Finder.of(tokenizer.convert_ids_to_tokens(sorted(self.end_of_turn_ids))).pattern
        self._piece_bytes: Callable[[str], bytes] | None = None  # unknown: then tokens are decoded one by one
        if described is not None:
            self._read_description(json.loads(described), added.values())
        self.set_template(template or (tokenizer.get_chat_template() if tokenizer.chat_template else None))

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        if self._backend is None:
            return [_split_encoding(text, self._encode_slowly) for text in texts]
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(encoding.ids, partial(_tokens_of, _Offsets(encoding))) for encoding in encodings]

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        if self._backend is None:
            return super().encode_packed(texts)
        return [pack_ids(one.ids) for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return piece.encode()
        return self._piece_bytes(piece) if self._piece_bytes else self.decode([token]).encode()

    def _read_description(self, parts: dict[str, Any], added: Collection[tokenizers.AddedToken]) -> None:
        special = [token.content for token in added if token.special]
        begins = {text[:length] for text in special for length in range(1, len(text) + 1)}
        self.splits_at_specials = (
            not any(token.lstrip or token.rstrip or token.single_word for token in added)
            and not any(token.normalized for token in added if token.special)
            and not any(text[length:] in begins for text in special for length in range(1, len(text)))  # none overlap
        )
        model = parts["model"]
        self.tokens_are_texts = (
            model["type"] == "BPE"
            and not model["dropout"]
            and "ByteLevel" in _types(parts["pre_tokenizer"])
            and {*_types(parts["normalizer"])} <= {"NFC"}
        )
        decoders = _types(parts["decoder"])
        if "ByteLevel" in decoders:
            self._piece_bytes = pieces.byte_level
        elif {"Metaspace", "ByteFallback", "Replace"} & {*decoders}:
            self._piece_bytes = pieces.sentencepiece

    def _encode_slowly(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _fingerprint(self, described: str | None) -> str:
        if described is not None:
            identity: dict[str, Any] = {"backend": described}
        else:
            files = (Path(self.path) / name for name in self._tokenizer.vocab_files_names.values())
            identity = {
                "class": type(self._tokenizer).__name__,
                "vocabulary": self._tokenizer.get_vocab(),
                "files": [sha256(file.read_bytes()) for file in files if file.is_file()],
            }
        identity["special_tokens"] = {name: str(token) for name, token in self.special_tokens.items()}
        return sha256(json.dumps(identity, sort_keys=True).encode())


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece `.model` file. The text of a control piece (such as `</s>`) is encoded as that piece.

    Text between control pieces is encoded on its own, as Llama 2's own code does with its turns.
    """

    def __init__(self, path: str | Path, template: str | None = None):
        self.path = str(path)
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer: {path} cannot be loaded as a sentencepiece model: {error}") from error
        self._model = model
        self.vocabulary_size = model.get_piece_size()
        ids = {model.id_to_piece(token_id): token_id for token_id in range(self.vocabulary_size)}
        self._controls = {piece: token_id for piece, token_id in ids.items() if model.is_control(token_id)}
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self.bos_id, self.eos_id = (
            token_id if token_id >= 0 else None for token_id in (model.bos_id(), model.eos_id())
        )
        known_ends = {ids[piece] for piece in END_OF_TURN if piece in ids}
        self.end_of_turn_ids = frozenset(known_ends if self.eos_id is None else known_ends | {self.eos_id})
        self.special_ids = frozenset(self._controls.values()) | self.end_of_turn_ids
        self.specials = Finder.of(map(model.id_to_piece, sorted(self.special_ids)))
        self.end_pattern = Finder.of(map(model.id_to_piece, sorted(self.end_of_turn_ids))).pattern
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        self.special_tokens = {name: model.id_to_piece(i) for name, i in named.items() if i is not None}
        self.fingerprint = sha256(Path(path).read_bytes())
        self.set_template(template)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Control pieces by their names, which sentencepiece itself leaves out."""
        texts = []
        for control, run in groupby(map(int, ids), key=lambda token_id: self._model.is_control(token_id)):
            same = list(run)
            texts.append("".join(map(self._model.id_to_piece, same)) if control else self._model.decode(same))
        return "".join(texts)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocabulary_size:
            return b""
        if self._model.is_unknown(token):
            return self._model.decode([token]).encode()
        piece = self._model.id_to_piece(token)
        return piece.encode() if self._model.is_control(token) else pieces.sentencepiece(piece)

    def _encode(self, text: str) -> Encoding:
        ids: list[int] = []
        offsets: list[Span] = []
        position = 0
        for part in self._split.split(text) if self._split else [text]:
            if part in self._controls:
                ids.append(self._controls[part])
                offsets.append((position, position + len(part)))
            elif part:
                mapping = self._model.encode_as_offset_mapping(part)
                ids.extend(mapping["ids"])
                offsets.extend((position + start, position + stop) for start, stop in mapping["offsets"])
            position += len(part)
        return Encoding(ids, partial(_tokens_of, offsets))


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> TextTokenizer:
    """Load a Hugging Face folder or a sentencepiece `.model` file; `chat_template` (Jinja) replaces its own.

    Raises `ValueError` for a path that is neither.
    """
    if Path(path).is_dir():
        # A vocabulary is so many objects that Python would look through all that is loaded, which takes longer than this.
        with without_collections():
            return HuggingFaceTokenizer(path, chat_template)
    if Path(path).is_file() and Path(path).suffix == ".model":
        return SentencePieceTokenizer(path, chat_template)
    if not Path(path).exists():
        raise ValueError(f"tokenizer: {missing(str(path), 'name a Hugging Face folder, or a .model file', 'model')}")
    raise ValueError(f"tokenizer: {path} is neither a Hugging Face folder nor a sentencepiece .model file: give either")


def sha256(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def _types(part: dict[str, Any] | None) -> list[str]:
    """Types of a part of a tokenizer, or of the parts that it consists of."""
    if part is None:
        return []
    steps = part.get("normalizers", part.get("pretokenizers", part.get("decoders")))
    return [part["type"]] if steps is None else [name for step in steps for name in _types(step)]


class _Offsets(Sequence[Span]):
    """Characters of each token; asks for those that are looked at, where `encoding.offsets` lists all of them."""

    def __init__(self, encoding: tokenizers.Encoding):
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, token: Any) -> Any:
        chars = self._encoding.token_to_chars(token)
        assert chars is not None, "every token is of the text: no special token was added"
        return chars


def _tokens_of(offsets: Sequence[Span], start: int, stop: int) -> Span:
    """Tokens that hold any of the characters [start, stop), by each token's characters, which ascend.

    A token of no width stands for something that the tokenizer put before the character that follows, and is with it.
    """
    first = bisect_left(offsets, True, key=lambda token: token[1] > start or token[0] == start)
    return first, max(first, bisect_left(offsets, stop, key=lambda token: token[0]))


def _split_encoding(text: str, encode: Callable[[str], list[int]]) -> Encoding:
    """Encoding without offsets: positions are known where splitting the text changes no token."""
    ids = encode(text)
    known = (0, 0)  # the border found last: character, token

    def border(char: int) -> int:
        nonlocal known
        last, token = known if known[0] <= char else (0, 0)
        part = encode(text[last:char])
        if ids[token : token + len(part)] != part:
            last, token, part = 0, 0, encode(text[:char])  # some tokenizers put something before every text
        if ids[token : token + len(part)] != part:
            raise BadRow(
                f"the tokenizer has no offsets, and its tokens run across the role border at character "
                f"{char}: use a fast tokenizer (tokenizer.json) or a template with a special token there"
            )
        known = (char, token + len(part))
        return known[1]

    return Encoding(ids, lambda start, stop: (border(start), border(stop)))
