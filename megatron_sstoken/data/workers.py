"""Chunks of rows → samples, by several processes, in the order of the chunks."""

import gc
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.inputs.chunks import Chunk
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.rows.formats import parse_row
from megatron_sstoken.data.store import Samples
from megatron_sstoken.data.text.limits import BadTemplate, limit_memory
from megatron_sstoken.data.text.masks import TokenizedSample, tokenize_conversations
from megatron_sstoken.data.text.template_style import really_unused
from megatron_sstoken.data.tokenizer import TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer

CHUNKS_IN_FLIGHT = 4  # per worker: enough to keep all busy, few enough to bound memory


@dataclass(frozen=True)
class BadPlace:
    """A row that cannot be prepared."""

    file: str
    unit: str
    place: int
    where: str
    reason: str
    text: str

    def describe(self) -> dict[str, Any]:
        """As `skipped.jsonl` has it."""
        return {"file": self.file, self.unit: self.place, "reason": self.reason, "text": self.text}


@dataclass(frozen=True)
class TokenizedChunk:
    """The samples of a chunk, their rows int64 [num_samples] and labels [num_samples] (None: the row says nothing).

    `rows` counts from 0 at the chunk's first row that is not blank, of which there are `num_rows`.
    """

    samples: Samples
    rows: np.ndarray
    labels: list[str | None]
    num_rows: int
    bad: list[BadPlace]
    notes: Counter[str] = field(default_factory=Counter)


def default_workers() -> int:
    """One process per core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def start_ahead(workers: int) -> None:
    """Begin to import what workers need, in the process that they will be forked from, while this one goes on."""
    if workers > 1:
        _context()
        forkserver.ensure_running()


def _context() -> ForkServerContext:
    # Forking a process that has threads (torch's, tqdm's) is unsafe; a server forks clean copies that have
    # already imported what takes seconds, among it what transformers imports only when it reads a configuration.
    context = get_context("forkserver")
    lazily = "transformers.utils.type_validators"
    context.set_forkserver_preload(["transformers.models.auto.tokenization_auto", lazily, __name__])
    return context


def tokenize_chunk(tokenizer: TextTokenizer, recipe: Recipe, chunk: Chunk) -> TokenizedChunk:
    """Tokenise the rows of a chunk; bad ones are reported in the result."""
    conversations: list[Conversation] = []
    places: list[tuple[int, int, Any]] = []
    bad: list[BadPlace] = []

    def refuse(place: int, raw: Any, reason: BadRow) -> None:
        bad.append(BadPlace(chunk.file, chunk.unit, place, chunk.where(place), str(reason), chunk.text(raw)))

    num_rows = 0
    for row, (place, raw) in enumerate(chunk.rows()):
        num_rows = row + 1
        try:
            conversations.append(parse_row(chunk.decode(raw), recipe))
            places.append((row, place, raw))
        except BadRow as error:
            refuse(place, raw, error)
    samples: list[TokenizedSample] = []
    rows, labels = [], []
    notes: Counter[str] = Counter()
    results = tokenize_conversations(tokenizer, conversations, recipe)
    for result, conversation, (row, place, raw) in zip(results, conversations, places, strict=True):
        if isinstance(result, BadRow):
            refuse(place, raw, result)
            continue
        samples.append(result)
        rows.append(row)
        labels.append(conversation.source)
        if result.notes or conversation.notes or conversation.unused:
            unused = _unused_notes(conversation.unused, tokenizer.template)
            notes.update({*result.notes, *conversation.notes, *unused})
    return TokenizedChunk(
        samples=Samples(
            tokens=np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)]),
            roles=np.concatenate([np.empty(0, np.uint8), *(sample.roles for sample in samples)]),
            lengths=np.array([sample.tokens.size for sample in samples], dtype=np.int64),
            weights=_weights(samples),
        ),
        rows=np.array(rows, dtype=np.int64),
        labels=labels,
        num_rows=num_rows,
        bad=sorted(bad, key=lambda one: one.place),
        notes=notes,
    )


def _weights(samples: list[TokenizedSample]) -> np.ndarray | None:
    if all(sample.weights is None for sample in samples):
        return None
    return np.concatenate(
        [sample.roles.astype(np.float32) if sample.weights is None else sample.weights for sample in samples]
    )


@lru_cache(maxsize=1024)  # rows of a data set have few combinations
def _unused_notes(unused: tuple[str, ...], template: str | None) -> frozenset[str]:
    """What the summary says of columns and keys that nothing reads."""
    named = [name.rpartition(".")[::2] for name in really_unused(unused, template)]
    return frozenset(
        f"key `{key}` of `{owner}` is not used" if owner else f"column `{key}` is not used" for owner, key in named
    )


def tokenize_chunks(
    tokenizer: TextTokenizer, recipe: Recipe, chunks: Iterable[tuple[Any, Chunk]], workers: int
) -> Iterator[tuple[Any, TokenizedChunk]]:
    """Tokenised chunks in the order of `chunks`, each with what came with it. Raises ValueError where a worker is killed."""
    if workers == 1:
        yield from ((mark, tokenize_chunk(tokenizer, recipe, chunk)) for mark, chunk in chunks)
        return
    arguments = (tokenizer.path, tokenizer.template, recipe)
    with ProcessPoolExecutor(workers, _context(), initializer=_start_worker, initargs=arguments) as pool:
        try:
            yield from _in_order(pool.submit, chunks, CHUNKS_IN_FLIGHT * workers)
        except BrokenProcessPool as error:
            raise BadTemplate(
                "a worker was killed, probably out of memory: use fewer --workers, or another chat template if this one "
                "takes the memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    submit: Callable[..., Future], chunks: Iterable[tuple[Any, Chunk]], num_in_flight: int
) -> Iterator[tuple[Any, TokenizedChunk]]:
    pending: deque[tuple[Any, Future]] = deque()
    for mark, chunk in chunks:
        pending.append((mark, submit(_work, chunk)))
        if len(pending) == num_in_flight:
            first, future = pending.popleft()
            yield first, future.result()
    while pending:
        first, future = pending.popleft()
        yield first, future.result()


_worker: tuple[TextTokenizer, Recipe] | ValueError  # of a worker process; the error that kept it from starting


def _start_worker(tokenizer_path: str, template: str | None, recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, with which they end
    limit_memory()
    try:
        _worker = load_tokenizer(tokenizer_path, template), recipe
    except ValueError as error:
        _worker = error
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What is loaded by now stays: collections need not walk through it. What a chunk makes holds next to no cycles: to walk
    # through it time and again, as by default every 700 objects, takes as long as reading the rows.
    gc.freeze()
    gc.set_threshold(200_000)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop; they would wait for chunks forever."""
    parent = parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> TokenizedChunk:
    if isinstance(_worker, ValueError):
        raise _worker
    return tokenize_chunk(*_worker, chunk)
