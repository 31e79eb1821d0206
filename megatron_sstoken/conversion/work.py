"""The work of a conversion: bounded memory, several workers, progress, and an output that is whole or absent.

Files are made in `<output>.partial/content`; `<output>.partial/manifest.json` lists those that are complete. The folder
is renamed to `<output>` once everything in it is on disk.
"""

import ctypes
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_sstoken.conversion.safetensors_files import INDEX
from megatron_sstoken.files import (
    BYTE_UNITS,
    begin_sync,
    format_bytes,
    publish_folder,
    source_inside,
    write_durably,
    write_json,
)
from megatron_sstoken.integrity import CHECKSUMS, FileCheck, checksum_of, files_to_check, write_checksums
from megatron_sstoken.model.dtypes import DTYPES

Task = TypeVar("Task")

_LIBRARY = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = 64 << 20


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert."""

    dtype: str | None = None
    """Of the weights written: fp32, bf16 or fp16. None: the source's."""
    max_memory: int = 4 * 10**9
    """Bytes of tensors in memory at any time: pages of mapped files and copies made of them, over all workers."""
    shard_size: int = 5 * 10**9
    """Largest size of one file of weights in bytes; a larger tensor gets a file of its own."""
    workers: int = 2
    """Threads that read, convert and write."""
    overwrite: bool = False
    """Replace an output that exists."""
    verify: bool = True
    """Compare what is read with its checksums, where it has them, while it is converted."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype={self.dtype} is unknown: use {', '.join(DTYPES)}")
        for name in ("max_memory", "shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} is too small: use 1 or more")

    def checked(self, *folders: str | Path) -> list[Path]:
        """Those of the folders that are read which a `Workplace` compares with their checksums."""
        return list(dict.fromkeys(map(Path, folders))) if self.verify else []


def parse_bytes(text: str) -> int:
    """A size such as 2GB, 500MB or 1.5GiB in bytes. Raises ValueError for anything else."""
    upper = text.strip().upper()
    unit = next((unit for unit in BYTE_UNITS if upper.endswith(unit)), "")
    try:
        return int(float(upper.removesuffix(unit)) * BYTE_UNITS.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a size: write 2GB, 500MB or 1.5GiB") from error


class MemoryBudget:
    """Bytes that workers share; whoever would exceed it waits."""

    def __init__(self, total: int):
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes, which must not exceed the total."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def check_memory(max_memory: int, costs: dict[str, int]) -> None:
    """Raise ValueError unless every tensor (name → bytes that converting it takes) fits `max_memory`."""
    name = max(costs, key=lambda name: costs[name])
    if costs[name] > max_memory:
        raise ValueError(
            f"--max_memory={format_bytes(max_memory)} is too small: converting the largest tensor, {name}, takes "
            f"{format_bytes(costs[name])}"
        )


def limit_freed_memory(max_memory: int) -> None:
    """Have glibc keep at most 64 MB, or 1/32 of the bound, of freed memory in every thread, and return larger blocks at once.

    To fill memory that is new to the process takes five times as long as to fill the same memory again. By itself glibc's
    limits grow with what is freed, which `MemoryBudget` knows nothing of.
    """
    if hasattr(_LIBRARY, "mallopt"):
        kept = min(_KEPT, max_memory // 32)
        _LIBRARY.mallopt(_M_MMAP_THRESHOLD, kept // 2)
        _LIBRARY.mallopt(_M_TRIM_THRESHOLD, kept)


class Stopped(Exception):
    """Another worker failed."""


def run_tasks(work: Callable[[Task, Callable[[], None]], None], tasks: Iterable[Task], workers: int) -> None:
    """Call `work(task, check)` for all tasks on `workers` threads; the first exception is raised once all have ended.

    `check()` raises Stopped when another worker has failed: long work calls it from time to time.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    with ThreadPoolExecutor(workers) as pool:
        # Each in the caller's context, where torch keeps settings such as whether torch.save computes checksums.
        futures = [pool.submit(copy_context().run, work, task, check) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


CONVERSION = "conversion.json"
"""File in every output that lists its files, so that a later conversion knows what it may replace."""


def refuse_existing(output: str, overwrite: bool, sources: Iterable[str]) -> None:
    """Raise ValueError for an output that must not be made there: before any work, and whatever `overwrite` says.

    With `overwrite` an output takes the place of what a conversion made and nobody has added to; never of a source (files
    or folders), of a folder that holds one, or of a link.
    """
    if source := source_inside(output, sources):
        raise ValueError(f"--output={output} is, or holds, what is read ({source}): name another --output")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"{output} exists: name another --output, or pass --overwrite")
    if foreign := _not_of_a_conversion(Path(output)):
        raise ValueError(
            f"--overwrite does not replace {output}: {foreign}: name another --output, or remove it yourself"
        )


def _not_of_a_conversion(folder: Path) -> str | None:
    """What in a folder no conversion made; None if all of it is of one."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder"
    try:
        made = set(json.loads((folder / CONVERSION).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"it has no {CONVERSION}, which every conversion leaves"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    added = sorted(found - made - {CONVERSION})
    return f"{', '.join(added[:3])} is not of the conversion that made it" if added else None


_REMEDY = "take another copy, or pass --no-verify to convert it as it is"


def _is_read(name: str) -> bool:
    """Whether a file decides the weights that are read: of a Hugging Face folder people edit the others."""
    return not name.endswith((".json", ".jinja", ".md", ".txt", ".model", ".py")) or name in ("metadata.json", INDEX)


class Workplace:
    """The partial folder of one conversion, which a second start of the same conversion goes on with.

    A context manager: it keeps other conversions away from the folder. `identity` (JSON) is what the bytes of the output
    depend on. Files that are not complete, and all that a conversion of another identity left, are deleted. `sources`:
    folders whose files are compared with their checksums meanwhile; nothing is published of damaged ones.
    """

    def __init__(self, output: str, identity: dict[str, Any], sources: Iterable[Path] = ()):
        parts = [files_to_check("what is converted", folder, _REMEDY, wanted=_is_read) for folder in sources]
        self.target = Path(os.path.abspath(output))
        self._partial = self.target.with_name(self.target.name + ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self.folder = self._partial / "content"
        self._manifest = self._partial / "manifest.json"
        self._identity = identity
        self._guard = threading.Lock()
        self.complete: dict[str, dict[str, Any]] = self._read_manifest()
        """Files that are complete: name → their record, with `size` in bytes."""
        self.folder.mkdir(exist_ok=True)
        self._check = FileCheck(parts)
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in self.complete:
                path.unlink()

    def __enter__(self) -> "Workplace":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def _take_lock(self) -> int:
        descriptor = os.open(self._partial / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{self._partial}: another conversion is writing it: wait for it, or stop it") from error
        return descriptor

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        if not self._manifest.is_file():
            return {}
        content = json.loads(self._manifest.read_text(encoding="utf-8"))
        if content["identity"] != self._identity:
            return {}
        return {name: record for name, record in content["files"].items() if self._has(name, record["size"])}

    def _has(self, name: str, size: int) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size

    def add(self, name: str, descriptor: int, record: dict[str, Any]) -> None:
        """Note that the file `name`, open as `descriptor`, is complete, once its bytes are on disk."""
        begin_sync(descriptor)
        checksum = checksum_of(self.folder / name)
        os.fsync(descriptor)
        with self._guard:
            self.complete[name] = record | {"checksum": checksum, "size": checksum["size"]}
            write_durably(self._manifest, json.dumps({"identity": self._identity, "files": self.complete}))

    def require_space(self, total: int) -> None:
        """Raise ValueError unless the disk has room for the rest of an output of `total` bytes."""
        missing = total - sum(record["size"] for record in self.complete.values())
        free = shutil.disk_usage(self._partial).free
        if missing > free:
            raise ValueError(
                f"{self.target.parent} has {format_bytes(free)} free, the output takes {format_bytes(missing)}: "
                "make room or name another --output"
            )

    def publish(self, inside: str = ".") -> Path:
        """Make the output appear, in one rename. Its files, or those of the folder `inside` it, get checksums.

        Raises ValueError where the sources turn out to be damaged.
        """
        if problems := self._check.wait():
            raise ValueError("; ".join(problems))
        part = self.folder / inside
        names = [str(path.relative_to(part)) for path in part.rglob("*") if path.is_file() and path.name != CHECKSUMS]
        known = {name: record["checksum"] for name, record in self.complete.items() if "checksum" in record}
        write_checksums(
            part,
            {name: known.get(os.path.normpath(f"{inside}/{name}")) or checksum_of(part / name) for name in names},
        )
        files = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        write_json(self.folder / CONVERSION, {"made_by": "tools/convert_checkpoint.py", "files": files})
        publish_folder(self.folder, self.target, overwrite=True)
        shutil.rmtree(self._partial)
        return self.target


def progress_bar(total: int, done: int, title: str) -> tqdm:
    """Bytes written, with rate and time left."""
    return tqdm(total=total, initial=done, desc=title, unit="B", unit_scale=True, smoothing=0.05)
