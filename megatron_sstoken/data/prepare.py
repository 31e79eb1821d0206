"""Data preparation: JSON lines → a prepared folder, by several processes; their number changes no byte."""

import gc
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.formats import decode_line, parse_row
from megatron_sstoken.data.limits import BadTemplate, limit_memory, memory_limit
from megatron_sstoken.data.masks import tokenize_conversations
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, Recipe
from megatron_sstoken.data.store import (
    MANIFEST,
    NO_TEMPLATE,
    STORE_FORMAT,
    SampleStore,
    StoreManifest,
    StoreWriter,
)
from megatron_sstoken.data.templates import find_template, require_tokens
from megatron_sstoken.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_sstoken.files import naming, source_inside, whole_folder
from megatron_sstoken.integrity import CHECKSUMS
from megatron_sstoken.lock import Lock

CHUNK_BYTES = 256 * 1024
CHUNKS_IN_FLIGHT = 4  # per worker: enough to keep all busy, few enough to bound memory
NUM_SHOWN = 10  # bad rows in an error message
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class LineChunk:
    """Consecutive whole lines of one input file; `first_line` counts from 1."""

    file: str
    first_line: int
    lines: list[bytes]


@dataclass(frozen=True)
class BadLine:
    """A row that cannot be prepared."""

    file: str
    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class TokenizedChunk:
    """Samples of a chunk end to end: tokens int32 [n], roles uint8 [n], lengths and rows int64 [num_samples].

    `rows` counts from 0 at the chunk's first non-blank line, of which there are `num_rows`.
    """

    tokens: np.ndarray
    roles: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    num_rows: int
    num_bytes: int
    bad: list[BadLine]

    def samples(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokens, roles and row of each sample."""
        stops = np.cumsum(self.lengths).tolist()
        for start, stop, row in zip([0, *stops], stops, self.rows.tolist(), strict=False):
            yield self.tokens[start:stop], self.roles[start:stop], row


@dataclass
class SourceFile:
    """An input file; size and hash grow as it is read, so that they are of the bytes that were prepared."""

    path: str
    size: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)

    def chunks(self) -> Iterator[LineChunk]:
        """The file in chunks of about `CHUNK_BYTES`."""
        first_line = 1
        with open(self.path, "rb") as stream:
            while lines := stream.readlines(CHUNK_BYTES):
                data = b"".join(lines)
                self.size += len(data)
                self._hash.update(data)
                yield LineChunk(self.path, first_line, lines)
                first_line += len(lines)

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self._hash.hexdigest()}


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    chat_template: str | Path | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    workers: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    progress: bool = True,
) -> StoreManifest:
    """Tokenise JSON-lines files into the prepared folder `output`, which appears complete or not at all.

    `chat_template`, a file or the name of a template that comes with the package, replaces the tokenizer's. `workers`
    processes tokenise (1: this one; default `default_workers()`). Bad rows are an error that lists the first ones, or
    are left out and written to `skipped.jsonl`. Raises `ValueError` for these, for unusable paths and for an existing `output`
    without `overwrite`.
    """
    output = Path(output)
    workers = default_workers() if workers is None else workers
    _check_arguments(inputs, output, workers, overwrite)
    template_files = [chat_template] if chat_template and Path(chat_template).is_file() else []
    if source := source_inside(output, [*inputs, tokenizer_path, *template_files]):
        raise ValueError(f"--output: {output} is, or holds, what is read ({source}): choose another folder")
    tokenizer = load_tokenizer(tokenizer_path, find_template(chat_template) if chat_template else None)
    require_tokens(tokenizer)
    sources = [SourceFile(str(path)) for path in inputs]
    chunks = (chunk for source in sources for chunk in source.chunks())
    total = sum(os.path.getsize(source.path) for source in sources)
    with (
        sole_maker(output),
        naming(output),
        memory_limit() if workers == 1 else nullcontext(),
        whole_folder(output, overwrite=overwrite) as partial,
        StoreWriter(partial) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="prepare", disable=not progress) as bar,
    ):
        results = _tokenize_chunks(tokenizer, recipe, chunks, workers)
        num_bad = _write(results, writer, bar, partial / SKIPPED if on_bad_row == "skip" else None)
        return writer.finalize(
            vocabulary_size=tokenizer.vocabulary_size,
            eos_token_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_path=os.path.abspath(tokenizer.path),
            template=tokenizer.template,
            template_source=_template_source(tokenizer, chat_template),
            num_skipped=num_bad,
            sources=[source.describe() for source in sources],
        )


def default_workers() -> int:
    """One process per core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def summary(path: str | Path) -> str:
    """A short table of what a prepared folder holds."""
    store = SampleStore(path)
    manifest = store.manifest
    share = manifest.num_response_tokens / manifest.num_tokens
    entries = {
        "rows": f"{manifest.num_samples + manifest.num_skipped:,}",
        "samples": f"{manifest.num_samples:,}",
        "skipped": f"{manifest.num_skipped:,}" + (f" (see {Path(path) / SKIPPED})" if manifest.num_skipped else ""),
        "tokens": f"{manifest.num_tokens:,}",
        "response tokens": f"{manifest.num_response_tokens:,} ({share:.1%})",
        "longest sample": f"{manifest.longest_sample:,} tokens",
        "median sample": f"{np.median(store.lengths):,.0f} tokens",
        "template": manifest.template_source,
        "output": str(path),
    }
    return "\n".join(f"{name:<16} {value}" for name, value in entries.items())


def tokenize_chunk(tokenizer: TextTokenizer, recipe: Recipe, chunk: LineChunk) -> TokenizedChunk:
    """Tokenise the non-blank lines of a chunk; bad ones are reported in the result."""
    conversations, places, bad = [], [], []
    row = -1
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark
        if not line.strip():
            continue
        row += 1
        try:
            conversations.append(parse_row(decode_line(line), recipe))
            places.append((row, number, line))
        except BadRow as error:
            bad.append(_bad_line(chunk.file, number, error, line))
    samples, rows = [], []
    for result, (place, number, line) in zip(
        tokenize_conversations(tokenizer, conversations, recipe), places, strict=True
    ):
        if isinstance(result, BadRow):
            bad.append(_bad_line(chunk.file, number, result, line))
        else:
            samples.append(result)
            rows.append(place)
    return TokenizedChunk(
        tokens=np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)]),
        roles=np.concatenate([np.empty(0, np.uint8), *(sample.roles for sample in samples)]),
        lengths=np.array([sample.tokens.size for sample in samples], dtype=np.int64),
        rows=np.array(rows, dtype=np.int64),
        num_rows=row + 1,
        num_bytes=sum(map(len, chunk.lines)),
        bad=sorted(bad, key=lambda line: line.line),
    )


def _bad_line(file: str, number: int, reason: BadRow, line: bytes) -> BadLine:
    return BadLine(file, number, str(reason), line.decode("utf-8", errors="backslashreplace").rstrip("\r\n"))


def _check_arguments(inputs: Sequence[str | Path], output: Path, workers: int, overwrite: bool) -> None:
    for path in inputs:
        if not Path(path).is_file():
            raise ValueError(f"--input: {path} is not a file: give JSON-lines files")
    if not inputs:
        raise ValueError("--input: no file given: give at least one JSON-lines file")
    if workers < 1:
        raise ValueError(f"--workers: {workers} must be at least 1")
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"--output: {output} exists: choose another folder or pass --overwrite")
    if os.path.lexists(output):
        _refuse_foreign(output)


_OWN_FILES = frozenset(
    (
        "tokens.bin",
        "tokens.idx",
        "roles.bin",
        "roles.idx",
        "rows.npy",
        "response_counts.npy",
        "labels.npy",
        "weights.bin",
        MANIFEST,
        CHECKSUMS,
        SKIPPED,
    )
)
_HISTORY = "history"  # folder beside the data, with losses that runs have scored


def _refuse_foreign(output: Path) -> None:
    """Raise ValueError unless a folder holds prepared data and nothing else, and no run is scoring it."""
    if not _is_prepared(output):
        raise ValueError(f"--output: {output} was not made by this tool, so it is not overwritten: remove it yourself")
    for path in output.iterdir():
        if path.name not in _OWN_FILES and path.name != _HISTORY:
            raise ValueError(
                f"--output: {path} was not made by this tool, so {output} is not overwritten: move it away"
            )
    for path in (output / _HISTORY).glob("*.lock"):
        if holder := Lock(path).holder():
            raise ValueError(f"--output: {output} is in use, {holder} is scoring its history: wait for it, or stop it")


@contextmanager
def sole_maker(output: Path) -> Iterator[None]:
    """Within, this process alone makes `output`. Raises ValueError where another one does."""
    with Lock(output.with_name(f"{output.name}.lock")) as lock:
        if holder := lock.take():
            raise ValueError(f"--output: {output} is being made by {holder}: wait for it, or stop it")
        yield
        for old in output.parent.glob(f"{output.name}.replaced-*"):  # a run that was killed had put it aside
            if _is_prepared(old):
                shutil.rmtree(old)


def _is_prepared(path: Path) -> bool:
    """Whether a folder has a manifest of ours, of whatever version."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not path.is_symlink() and isinstance(content, dict) and content.get("format") == STORE_FORMAT


def _template_source(tokenizer: TextTokenizer, chat_template: str | Path | None) -> str:
    if tokenizer.template is None:
        return NO_TEMPLATE
    roles = "roles by generation marks" if tokenizer.marked else "roles by comparing token prefixes"
    return f"{chat_template or 'of the tokenizer'}, {roles}"


def _write(results: Iterable[TokenizedChunk], writer: StoreWriter, bar: tqdm, skipped: Path | None) -> int:
    """Write samples in order; return the number of bad rows, which go to the file `skipped` (None: an error).

    All of the input is looked at before the error, so that it can say how many rows are bad.
    """
    num_rows = num_bad = 0
    shown: list[BadLine] = []
    with open(skipped, "w", encoding="utf-8") if skipped else nullcontext() as stream:
        for chunk in results:
            for tokens, roles, row in chunk.samples():
                writer.add(tokens, roles, num_rows + row)
            for bad in chunk.bad:
                if stream:
                    stream.write(json.dumps(vars(bad)) + "\n")
            num_rows += chunk.num_rows
            num_bad += len(chunk.bad)
            shown += chunk.bad[: NUM_SHOWN - len(shown)]
            bar.update(chunk.num_bytes)
            bar.set_postfix(rows=num_rows, bad=num_bad, refresh=False)
    if num_bad and not skipped:
        listed = "\n".join(f"  {bad.file}:{bad.line}: {bad.reason}" for bad in shown)
        more = f"\n  … and {num_bad - len(shown)} more" if num_bad > len(shown) else ""
        raise ValueError(
            f"{num_bad} of {num_rows} rows cannot be prepared: correct them or pass --on_bad_row skip\n{listed}{more}"
        )
    if skipped and not num_bad:
        skipped.unlink()
    return num_bad


def _tokenize_chunks(
    tokenizer: TextTokenizer, recipe: Recipe, chunks: Iterable[LineChunk], workers: int
) -> Iterator[TokenizedChunk]:
    """Tokenised chunks in the order of `chunks`."""
    if workers == 1:
        yield from (tokenize_chunk(tokenizer, recipe, chunk) for chunk in chunks)
        return
    # Forking a process that has threads (torch's, tqdm's) is unsafe; a server forks clean copies that have
    # already imported what takes seconds.
    context = get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.auto.tokenization_auto", __name__])
    arguments = (tokenizer.path, tokenizer.template, recipe)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            yield from _in_order(pool.submit, chunks, CHUNKS_IN_FLIGHT * workers)
        except BrokenProcessPool as error:
            raise BadTemplate(
                "a tokenising process ended at once, perhaps for want of memory: use fewer --workers, or another chat template"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    submit: Callable[..., Future], chunks: Iterable[LineChunk], num_in_flight: int
) -> Iterator[TokenizedChunk]:
    pending: deque[Future] = deque()
    for chunk in chunks:
        pending.append(submit(_work, chunk))
        if len(pending) == num_in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: tuple[TextTokenizer, Recipe]  # of a worker process


def _start_worker(tokenizer_path: str, template: str | None, recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, with which they end
    limit_memory()
    _worker = load_tokenizer(tokenizer_path, template), recipe
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what is loaded by now stays: collections need not walk through it


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop; they would wait for chunks forever."""
    parent = parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _work(chunk: LineChunk) -> TokenizedChunk:
    return tokenize_chunk(*_worker, chunk)
