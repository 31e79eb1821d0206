"""A plain loop over `tokenizers` in several processes, which keeps nothing but a count: preparation is measured beside it."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer

_tokenizer: tokenizers.Tokenizer
"""Of a worker process; `_load` sets it."""


def plain_loop(source: Path, tokenizer: Path, workers: int, text_of: Callable[[bytes], str], batch: int) -> int:
    """Number of tokens of all lines, each of which `text_of` makes a text; `batch` lines go to a process at a time."""
    with (
        open(source, "rb") as file,
        ProcessPoolExecutor(workers, get_context("forkserver"), initializer=_load, initargs=(str(tokenizer),)) as pool,
    ):
        return sum(pool.map(partial(_count, text_of), iter(lambda: list(islice(file, batch)), [])))


def chatml(*turns: tuple[str, str]) -> str:
    """The text of (role, content) by who knows the template by heart."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def _load(tokenizer: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer


def _count(text_of: Callable[[bytes], str], lines: list[bytes]) -> int:
    encodings = _tokenizer.encode_batch_fast([text_of(line) for line in lines], add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)
