"""Publish by renaming: a file or folder appears under its name whole, or not at all, also after a crash."""

import ctypes
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LIBRARY = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2  # Linux's fcntl.h
_WORTH_SYNC = 1 << 20  # bytes


def begin_sync(descriptor: int, start: int = 0, length: int = 0) -> None:
    """Have the system begin to write bytes of an open file to disk (length 0: to its end), so that fsync waits less."""
    if hasattr(_LIBRARY, "sync_file_range"):
        _LIBRARY.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def begin_sync_of_much(descriptor: int, start: int, stop: int) -> None:
    """`begin_sync` of bytes [start, stop), where they are so many that it is worth the call."""
    if stop - start >= _WORTH_SYNC:
        begin_sync(descriptor, start, stop - start)


def write_at(descriptor: int, content: bytes | memoryview, place: int) -> int:
    """Write all of `content` into an open file, from byte `place` on; returns where it ends."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], place + done)
    return place + done


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "make room, then start the same command again",
    (errno.EFBIG,): "raise the limit on the size of files (ulimit -f), or use another file system",
    (errno.EACCES, errno.EPERM, errno.EROFS): "let this user read and write there, or name another place",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG): "name another path",
    (errno.ECHILD,): "see whether its machine ran out of memory, then start the same command again",
    (errno.EIO, errno.ESTALE, errno.ENXIO): "see whether the disk or the file system is well, then start again",
}


def describe_os_error(error: OSError) -> str:
    """One line with path, reason and remedy."""
    paths = " → ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
    reason = error.strerror or str(error)
    remedy = next((text for codes, text in _REMEDIES.items() if error.errno in codes), "start the same command again")
    return f"{paths + ': ' if paths else ''}{reason}: {remedy}"


_NO_ROOM = 1 << 16
"""Bytes free on a disk that counts as full."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError that names no file names this one; the system does not say where a write failed."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise write_failure(error, path) from error


def write_failure(error: BaseException, path: Path) -> OSError:
    """The OSError that `error`, of writing `path`, comes from or stands for."""
    seen: list[BaseException] = [error]
    for one in seen:  # grows
        if isinstance(one, OSError) and one.errno is not None:
            return OSError(one.errno, os.strerror(one.errno), str(one.filename or path))
        if match := re.search(r"\[Errno (\d+)\]", str(one)):  # of another process, whose words alone came over
            return OSError(int(match[1]), os.strerror(int(match[1])), str(path))
        further = [one.__cause__, one.__context__, *getattr(one, "failures", {}).values()]
        for other in further:  # torch keeps an exception and its text for every rank
            other = other[0] if isinstance(other, tuple) and other else other
            if isinstance(other, BaseException) and other not in seen:
                seen.append(other)
    if shutil.disk_usage(existing_above(path)).free < _NO_ROOM:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return OSError(errno.EIO, f"{type(error).__name__}: {error}".splitlines()[0], str(path))


def existing_above(path: str | Path) -> Path:
    """The absolute `path`, or the nearest folder above it that exists."""
    existing = Path(os.path.abspath(path))
    while not existing.exists():
        existing = existing.parent
    return existing


def delete_old(folder: Path, pattern: str, *, seconds: float = 60) -> None:
    """Delete files that live for a moment only, and were left by what was killed in it: those older than `seconds`."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def partial_path(path: Path) -> Path:
    """Where to write a file before `publish_file` gives it the name `path`."""
    return path.with_name(f"{path.name}.partial")


def publish_file(partial: Path, path: Path) -> None:
    """Rename a complete file to `path` once its bytes are on disk; replaces what is there."""
    sync(partial)
    os.replace(partial, path)


def write_durably(path: Path, text: str) -> None:
    """Write a small file: after a crash it has the old content or the new one."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    publish_file(partial, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON object as `write_durably` does."""
    write_durably(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a folder that is made again when it is damaged. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}), so it is damaged: delete the folder and make it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object, so it is damaged: delete the folder and make it again")
    return content


def require_size(path: Path, size: int | None, remedy: str) -> None:
    """Raise ValueError unless the file is there with `size` bytes (None: with any number)."""
    found = path.stat().st_size if path.exists() else None
    if found is None or size not in (None, found):
        problem = "is missing" if found is None else f"has {found} bytes instead of {size}, so it is damaged"
        raise ValueError(f"{path} {problem}: {remedy}")


def publish_folder(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a complete folder to `target` once everything in it is on disk.

    With `overwrite` it takes the place of what is there; without, a folder that is not empty raises OSError.
    """
    inside = list(folder.rglob("*"))
    for path in (*inside, folder):  # a folder's entries after the files they name
        sync(path)
    replaced = None
    if overwrite and target.exists():
        # A folder cannot replace a folder in one step.
        replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
        os.replace(target, replaced)
    os.replace(folder, target)
    sync(target.parent)
    if replaced is not None and replaced.is_dir() and not replaced.is_symlink():
        shutil.rmtree(replaced)
    elif replaced is not None:
        replaced.unlink()


def source_inside(output: str | Path, sources: Iterable[str | Path]) -> Path | None:
    """The first of the sources (files or folders) that is `output`, or lies in it, whatever links lead there."""
    target = Path(os.path.realpath(output))
    found = map(Path, map(os.path.realpath, sources))
    return next((source for source in found if target == source or target in source.parents), None)


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write to; `publish_folder` publishes it if the block succeeds, else it is deleted.

    One process at a time may make `target`; what one that was killed has left of it is deleted.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        publish_folder(partial, target, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


BYTE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


def timestamp(timespec: str = "seconds") -> str:
    """The time in UTC, as ISO 8601 writes it."""
    return datetime.now(timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def format_bytes(size: int) -> str:
    """A size in bytes for people: 1.05 GB."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= BYTE_UNITS[unit]:
            return f"{size / BYTE_UNITS[unit]:.3g} {unit}"
    return f"{size} B"
