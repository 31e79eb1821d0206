"""One writer at a time: a lock file that says who holds it, on any file system that all nodes share.

A lock is stale when its process is gone from this machine, or when nobody has touched the file for a minute: then it is taken
over, with a note.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from megatron_sstoken.files import delete_old

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which the holder counts as gone."""


class Lock:
    """The right to write something, named by a lock file; held from `take` to `release` or as a context manager.

    One process of a job takes it (rank 0), for all of them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self) -> str | None:
        """Take the lock; None if that worked, else who holds it ("process 123 on node0"). Does not wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if self._create():
                # Left where another process was killed in the middle of a look.
                delete_old(self.path.parent, f"{self.path.name}.now-*", seconds=STALE)
                self._stop.clear()
                self._heart = threading.Thread(target=self._beat, name=f"lock {self.path}", daemon=True)
                self._heart.start()
                return None
            if (holder := self._holder()) is not None:
                return holder
        return "another process"

    def holder(self) -> str | None:
        """Who holds the lock now, if anybody does; a stale one is removed."""
        return self._holder() if self.path.exists() else None

    def release(self) -> None:
        """Give it back; does nothing if it is not held (any more)."""
        if self._heart is None:
            return
        self._stop.set()
        self._heart.join()
        self._heart = None
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def take_or_wait(self) -> str | None:
        """As `take`, but a holder that shows no sign of life is waited for until it counts as gone, a minute at most.

        A job that starts again on other nodes cannot see whether the process that it follows is gone.
        """
        holder, seen = self.take(), self._touched()
        while holder is not None:
            time.sleep(1)
            if self._touched() not in (seen, None):
                return holder
            holder = self.take()
        return None

    def _create(self) -> bool:
        """Make the lock file unless it is there."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}, file)
        except FileExistsError:
            return False
        return True

    def _holder(self) -> str | None:
        """Who holds the lock; None if it is free now, a stale one having been removed."""
        if (found := self._look()) is None:
            return None
        content, stale = found
        who = f"process {content['pid']} on {content['host']}" if content else "a process that has just started"
        if not stale:
            return who
        delete_old(self.path.parent, self._removing.name, seconds=STALE)
        try:
            self._removing.touch(exist_ok=False)
        except FileExistsError:
            return None  # another one removes it
        try:
            if self._look() != found:  # another one has removed it since, and may have made its own
                return None
            self.path.unlink(missing_ok=True)
        finally:
            self._removing.unlink(missing_ok=True)
        print(f"note: {self.path} was left behind by {who}, which has ended: taken over", file=sys.stderr, flush=True)
        return None

    def _look(self) -> tuple[dict, bool] | None:
        """What the lock file says, and whether it is stale; None if there is none."""
        content, age = _read(self.path), self._age()
        if age is None:
            return None
        gone = content.get("host") == socket.gethostname() and not _is_alive(content.get("pid"))
        return content, age >= STALE or gone

    @property
    def _removing(self) -> Path:
        """There while a process removes a stale lock: only one may, and after another look."""
        return self.path.with_name(f"{self.path.name}.removing")

    def _touched(self) -> int | None:
        """When the holder last gave a sign of life; None if there is none."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self) -> float | None:
        """Seconds since the last sign of life, by the clock of the file system; None if the lock is gone."""
        probe = self.path.with_name(f"{self.path.name}.now-{self._token}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.2):
            if time.monotonic() - last >= HEARTBEAT:
                last = time.monotonic()
                if _read(self.path).get("token") == self._token:
                    os.utime(self.path)


def _read(path: Path) -> dict:
    """What a lock file says; empty where it says nothing (yet)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if {"host", "pid", "token"} <= content.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, and alive
    return True
