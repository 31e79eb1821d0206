"""A start of the training program whose ranks are killed, watched from outside.

No torchrun watches over the ranks: that one ends when another is gone is their own doing. Each has a session of its own, so
that whatever it leaves can be found.
"""

import functools
import time
import types
from pathlib import Path
from typing import Any

from tests.helpers import programs

POLL = 0.0005
"""Seconds between two looks at a run: a rename is over in a moment."""


class Start:
    """The ranks of one start from now to their end, and what they print, in `rank<N>.txt` files.

    `slow_writes`: seconds that each tensor of a checkpoint takes to be written, besides.
    """

    def __init__(self, arguments: list[str], num_ranks: int, folder: Path, slow_writes: float = 0.0):
        self.begun, before = time.monotonic(), functools.partial(_before, slow_writes=slow_writes)
        self._program = programs.start("megatron_sstoken.train", arguments, num_ranks, folder, before=before)
        self.ranks, self.output = self._program.processes, self._program.output

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        """Where the campaign is interrupted, nothing of the start goes on."""
        if error is not None:
            self.end(0)
            self.left_processes(0)

    def alive(self) -> list[Any]:
        """The ranks that have not ended."""
        return [rank for rank in self.ranks if rank.is_alive()]

    def kill(self, ranks: list[Any]) -> None:
        """SIGKILL, to these ranks and to nothing else."""
        for rank in ranks:
            rank.kill()

    def end(self, within: float) -> bool:
        """Whether all ranks end by themselves within so many seconds; those that do not are killed."""
        deadline = time.monotonic() + within
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        hanging = self.alive()
        self.kill(hanging)
        for rank in self.ranks:
            rank.join()
        return not hanging

    def succeeded(self) -> bool:
        """Whether every rank has ended with exit code 0."""
        return all(rank.exitcode == 0 for rank in self.ranks)

    def left_processes(self, within: float = 10) -> list[str]:
        """Command lines of processes of the ranks' sessions that outlive them by so many seconds; they are killed then."""
        left = self._program.left(within)
        for process in left:
            process.kill()
        return [" ".join(process.info["cmdline"] or ["?"])[:160] for process in left]


def _before(rank: int, *, slow_writes: float) -> None:
    """What a rank does before the program."""
    if not slow_writes:
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async._write_item

    @functools.wraps(write)  # megatron looks at its parameters
    def slowly(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(slow_writes)
        return write(*arguments, **keywords)

    filesystem_async._write_item = slowly
