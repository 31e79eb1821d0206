"""One process tells the others what it died of, and all of them which one stands still.

A thread of each process writes into the store of torch.distributed, which a job has anyway, how far its process has come. The
training thread itself only notes that in a variable. Where nothing moves for most of a minute, one process says where each one
is; after the limit, all end.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

_GRACE = 60.0
"""Seconds that process groups wait longer than the watchdog, which says more than they do."""
_NOTICE = 40.0
"""Seconds without progress after which it is said who stands where, if it is also much longer than progress took before."""
_LONGER = 3.0
"""How much longer."""
_SILENT, _AT_WORK, _WAITING = range(3)
"""What a process that gets no further does, the likeliest culprits first."""
_TELL = 5.0
"""Seconds that a process which fails waits for process 0 to repeat why."""


class Watchdog:
    """The watch over one process of a job. `arrived` may be called anywhere; nothing else is the training thread's."""

    def __init__(self, limit: float, store: Any, rank: int, world_size: int):
        """`limit`: seconds without progress after which the job ends. `store`: a connection of this thread alone."""
        self._limit, self._store, self._rank, self._world_size = limit, store, rank, world_size
        self._period = min(max(limit / 20, 0.2), 5.0)
        self._main = threading.main_thread()
        self._place, self._count, self._since, self._beats = "starting", 0, time.monotonic(), 0
        self._longest, self._noticed, self._notices = 0.0, 0.0, 0
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self.repeated = False
        """Whether this is process 0 and has printed what another one died of."""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def arrived(self, place: str) -> None:
        """This process has come to `place` ("step 7"), which all processes come to in the same order."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._since)
        self._place, self._count, self._since, self._noticed, self._notices = place, self._count + 1, now, 0.0, 0

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def report(self, problem: str) -> None:
        """Tell the others why this process ends, and wait a moment for process 0 to repeat it."""
        try:
            with self._guard:
                told = {"rank": self._rank, "host": socket.gethostname(), "problem": problem}
                self._store.compare_set("fault", "", json.dumps(told))
            until = time.monotonic() + _TELL
            while self._rank != 0 and time.monotonic() < until and not self._is_set("repeated"):
                time.sleep(0.1)
        except RuntimeError:  # the store is gone with the process that kept it: nobody is left to tell
            pass

    def reported(self, wait: float = 0.0) -> str | None:
        """Why another process ended, in one line; None if none has said so within `wait` seconds."""
        until = time.monotonic() + wait
        try:
            while True:
                with self._guard:
                    fault = json.loads(self._store.get("fault")) if self._store.check(["fault"]) else None
                if fault is not None and fault["rank"] != self._rank:
                    return f"process {fault['rank']} on {fault['host']}: {fault['problem']}"
                if time.monotonic() >= until:
                    return None
                time.sleep(0.1)
        except RuntimeError:
            return None

    def _is_set(self, key: str) -> bool:
        with self._guard:
            return self._store.check([key])

    def _watch(self) -> None:
        last, wait = -self._period, 0.0
        while not self._stop.wait(wait):
            wait = min(self._period, 0.5)
            try:
                if self._rank == 0 and not self.repeated and (fault := self.reported()):
                    self.repeated = True
                    print(f"error: {fault}", file=sys.stderr, flush=True)
                    self._set("repeated", "")
                if time.monotonic() - last >= self._period:
                    last = time.monotonic()
                    self._publish(self._where()[0])
                    self._notice()
            except RuntimeError:
                pass  # without the store the watch goes on over this process alone
            if time.monotonic() - self._since > self._limit:
                self._end()

    def _set(self, key: str, value: str) -> None:
        with self._guard:
            self._store.set(key, value)

    def _publish(self, stack: str = "") -> None:
        self._beats += 1
        entry = {
            "host": socket.gethostname(),
            "place": self._place,
            "count": self._count,
            "beat": self._beats,
            "in": stack,
        }
        self._set(f"progress/{self._rank}", json.dumps(entry))

    def _notice(self) -> None:
        """Say where each process is, if nothing has moved for long and one keeps the others waiting, or seems to."""
        standing, since = time.monotonic() - self._since, self._since
        due = max(_NOTICE, _LONGER * self._longest, 2 * self._noticed)
        if standing < due or standing + 3 * self._period > self._limit:
            return
        self._noticed, self._notices = standing, self._notices + 1
        with self._guard:
            is_teller = self._store.add(f"notice/{self._count}/{self._notices}", 1) == 1
        if not is_teller:
            return
        lines = self._standing()
        # Who waits for a GPU's collective does not stand in one: there, a step in which they stand apart has to do.
        apart = len(lines) > 1 and self._count > 0 and dist.is_initialized() and dist.get_backend() == "nccl"
        if since == self._since and (apart or any(kind != _AT_WORK for kind, _ in lines)):
            listed = "\n".join(line for _, line in lines)
            print(
                f"note: no process got further for {standing:.0f} s (all end after {self._limit / 60:.3g} minutes, "
                f"training.timeout_minutes):\n{listed}",
                file=sys.stderr,
                flush=True,
            )

    def _end(self) -> None:
        """Say who stands still, and end this process."""
        where, waits = self._where()
        try:
            self._publish(where)
            with self._guard:
                is_teller = self._store.add("teller", 1) == 1
            if is_teller:
                self._tell()
                self._set("told", "")
            until = time.monotonic() + 10 * self._period + _TELL
            while not self._is_set("told") and time.monotonic() < until:
                time.sleep(self._period)
                self._publish(where)
        except RuntimeError as error:
            print(
                f"error: process {self._rank} ({where}) got no further for {self._limit / 60:.3g} minutes, and the store of "
                f"the job does not answer ({type(error).__name__}): process 0 or its node stands still or is gone",
                file=sys.stderr,
                flush=True,
            )
        if not waits:
            print(f"process {self._rank} stands here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            _write_flight_recorder(self._rank)
        os._exit(1)

    def _tell(self) -> None:
        listed = "\n".join(line for _, line in self._standing())
        print(
            f"error: no process got further for {self._limit / 60:.3g} minutes (training.timeout_minutes):\n{listed}\n"
            "Checkpoints so far are whole: start the same command on all nodes again to go on from the newest.",
            file=sys.stderr,
            flush=True,
        )

    def _standing(self) -> list[tuple[int, str]]:
        """Kind and line of where every process is; those that give no sign of life, or do not wait for another one, first."""
        before = self._entries()
        time.sleep(3 * self._period)
        entries = self._entries()
        lines: dict[tuple[int, str], list[int]] = {}
        for rank in range(self._world_size):
            entry, old = entries.get(rank), before.get(rank)
            if entry is None:
                line = _SILENT, "has not begun"
            elif rank != self._rank and old is not None and old["beat"] == entry["beat"]:
                line = _SILENT, f"gives no sign of life, was last at: {entry['place']} (on {entry['host']})"
            else:
                kind = _WAITING if entry["in"].startswith("waits") else _AT_WORK
                line = kind, f"is at: {entry['place']}, {entry['in'] or 'at work'}"
            lines.setdefault(line, []).append(rank)
        in_order = sorted(lines.items(), key=lambda one: (one[0][0], len(one[1]), one[1]))
        return [(kind, f"  process {_ranges(ranks)} {text}") for (kind, text), ranks in in_order]

    def _entries(self) -> dict[int, dict]:
        found = {}
        for rank in range(self._world_size):
            with self._guard:
                if self._store.check([f"progress/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"progress/{rank}"))
        return found

    def _where(self) -> tuple[str, bool]:
        """What the training thread does, and whether it waits for other processes."""
        frame: FrameType | None = sys._current_frames().get(self._main.ident or 0)
        innermost = frame
        while frame is not None:
            if "torch/distributed" in frame.f_code.co_filename:
                return f"waits for others in {frame.f_code.co_name}{_caller(frame)}", True
            frame = frame.f_back
        if innermost is None:
            return "", False
        code = innermost.f_code
        caller = "" if "megatron_sstoken" in code.co_filename else _caller(innermost)
        return f"works in {code.co_name} ({os.path.basename(code.co_filename)}:{innermost.f_lineno}){caller}", False


def _caller(frame: FrameType) -> str:
    """Where our own code called what `frame` belongs to."""
    here: FrameType | None = frame
    while here is not None:
        if "megatron_sstoken" in here.f_code.co_filename:
            return f" (called at {os.path.basename(here.f_code.co_filename)}:{here.f_lineno})"
        here = here.f_back
    return ""


def _ranges(ranks: list[int]) -> str:
    """Ascending numbers in short: 0-3, 7."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


_current: Watchdog | None = None


def group_timeout(minutes: float) -> timedelta:
    """How long process groups wait: a minute longer than the watchdog."""
    return timedelta(minutes=minutes, seconds=_GRACE)


def start(minutes: float) -> None:
    """Begin the watch of this process; called before torch.distributed is initialised from the environment, and after.

    It begins at the first call where torchrun keeps the store of the job, so that a process which never comes is named, too.
    """
    global _current
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if _current is not None or world_size == 1:
        return
    if not dist.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store: Any = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    named = dist.PrefixStore(f"megatron_sstoken/watchdog/{attempt}", store)
    _current = Watchdog(60 * minutes, named, rank, world_size)


def prepare_flight_recorder() -> None:
    """Have NCCL remember what it was asked for, to be written down when something hangs. Before process groups are made.

    What the user has set stays, by these names or by that of older versions of torch.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if not os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.join(tempfile.gettempdir(), "flight_recorder_"))


def _write_flight_recorder(rank: int) -> None:
    """Write down what NCCL was asked for last, in torch's own format, which `torchfrtrace` reads.

    torch would do so at its own timeout, which counts from the last operation and not from the last step.
    """
    from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # the stubs lack it

    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE") or os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    try:
        with open(f"{prefix}{rank}", "wb") as file:
            file.write(_dump_nccl_trace())
        print(f"process {rank}: NCCL's last operations are in {prefix}{rank}", file=sys.stderr, flush=True)
    except OSError as error:
        print(
            f"warning: {prefix}{rank}: {error.strerror}: NCCL's last operations are lost", file=sys.stderr, flush=True
        )


def stop() -> None:
    """End the watch, if there is one."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def arrived(place: str) -> None:
    """This process has come to `place`, as all others will or have."""
    if _current is not None:
        _current.arrived(place)


def report(problem: str) -> None:
    """Tell the other processes why this one ends."""
    if _current is not None:
        _current.report(problem)


def reported(wait: float) -> tuple[str | None, bool]:
    """Why another process ended, if it says so within `wait` seconds, and whether that has been printed here."""
    if _current is None:
        return None, False
    return _current.reported(wait), _current.repeated
