"""The processes that megatron's checkpoint writer starts beside each rank: they outlive signals, and not their rank."""

import multiprocessing
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_sstoken.checkpoint.lifetime import forks_end_with_this_process, serve_a_rank


def prepare_writer() -> None:
    """Start this rank's helper of the writer, before megatron does, where it is not there yet.

    torchrun and Slurm signal every process of a step. A rank takes SIGTERM as the wish to save and end; megatron's own helper
    would die of it, and the save with it. It would also stay for good, with all its memory, where its rank is killed; so would
    the writers that megatron forks, and keep the rank's connections open, so that no other rank notices.
    """
    forks_end_with_this_process()
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with _without_main_module():
            manager.start(initializer=serve_a_rank, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Within, a spawned process does not import the program again, with torch and megatron, before it begins."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
