"""The processes that write a checkpoint beside each rank: they outlive signals, and not their rank."""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_sstoken.checkpoint.lifetime import forks_end_with_this_process, outlive_signals, serve_a_rank
from megatron_sstoken.garbage import without_collections
from megatron_sstoken.integrity import Checksums, checksum_of


def prepare_writer() -> None:
    """Start this rank's helper of the writer, before megatron does, where it is not there yet.

    torchrun and Slurm signal every process of a step. A rank takes SIGTERM as the wish to save and end; megatron's own helper
    would die of it, and the save with it. It would also stay for good, with all its memory, where its rank is killed; so would
    the writers that are forked, and keep the rank's connections open, so that no other rank notices.
    """
    forks_end_with_this_process()
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with _without_main_module():
            manager.start(initializer=serve_a_rank, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


class Writing:
    """A forked process that writes this rank's part of a checkpoint as it is now, whatever becomes of it in training.

    As megatron does it: what lies on a GPU is first copied to pinned memory, and the device waited for; the process touches
    no CUDA and collects no garbage, which might. What lies on the CPU the fork itself keeps: the system copies a page when
    either process writes to it.
    """

    def __init__(self, request: AsyncRequest, folder: Path, rank: int):
        """`request`: what megatron has planned; `folder`: where; `rank`: the number in the names of this rank's files."""
        self._finalize = request.finalize_fns
        self._process, self._told, self._staged = None, None, None
        if request.async_fn is None:  # nothing to write here
            return
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            # Kept until all is written: pinned memory that is given back would take the next batch.
            arguments[1] = self._staged = request.preload_fn()
        write = functools.partial(request.async_fn, *arguments, **request.async_fn_kwargs)
        self._told, teller = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_write, args=(write, folder, rank, teller), name="checkpoint writer")
        with without_collections():  # of what is CUDA's, which a forked process must not do
            self._process.start()
        teller.close()  # the writer has its own: when that is closed, it has ended

    @property
    def is_over(self) -> bool:
        """Whether `wait` would return at once."""
        return self._told is None or self._told.poll()

    def wait(self) -> Checksums | str:
        """Checksums of the files, once they are on disk; or what went wrong, where megatron would not tell."""
        if self._told is None or self._process is None:
            return {}
        told: Checksums | str | None
        try:
            told = self._told.recv()
        except EOFError:
            told = None
        self._process.join()
        self._staged = None
        if told is None:
            code = self._process.exitcode or 0
            return f"its writer ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        return told

    def finalize(self) -> None:
        """Have megatron describe what was written; all ranks call it after `wait`.

        Raises what megatron does where a part could not be written.
        """
        for function in self._finalize:
            function()

    def abandon(self) -> None:
        """End the writer in the middle of its work."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(write: Callable[[], None], folder: Path, rank: int, teller: Connection) -> None:
    """In the forked process: write, and tell the checksums or what went wrong."""
    gc.disable()
    outlive_signals()
    signal.signal(signal.SIGCHLD, _notice_killed)
    try:
        write()
        teller.send({path.name: checksum_of(path) for path in folder.glob(f"__{rank}_*.distcp")})
    except OSError as error:
        teller.send(f"its writer failed: {error}")
        os._exit(1)  # at once, and with it processes of its own that still write


def _notice_killed(number: int, frame: Any) -> None:
    """Raise ChildProcessError where a writer's own process was killed, for which megatron-core 0.16 would wait for ever."""
    for child in psutil.Process().children():
        try:
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # waited for by now
            continue
        if ended is not None and ended.si_code != os.CLD_EXITED:
            raise ChildProcessError(f"its own process ended with signal {ended.si_status}")


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Within, a spawned process does not import the program again, with torch and megatron, before it begins."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
