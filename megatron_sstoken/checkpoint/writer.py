"""The process that megatron's checkpoint writer keeps beside each rank: it outlives signals, and not its rank."""

import ctypes
import multiprocessing
import os
import signal
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def prepare_writer() -> None:
    """Start this rank's helper of the writer, before megatron does, where it is not there yet.

    torchrun and Slurm signal every process of a step. A rank takes SIGTERM as the wish to save and end; megatron's own helper
    would die of it, and the save with it. It would also stay for good, with all its memory, where its rank is killed.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=_live_as_long_as_the_rank, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _live_as_long_as_the_rank(rank_process: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank_process:  # it ended before the kernel was asked to tell
        os._exit(1)
