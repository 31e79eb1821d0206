"""What the helpers of a rank do with its end and with signals. Imports nothing that takes time: helpers begin here."""

import ctypes
import functools
import importlib
import os
import signal
import threading
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have the kernel end this process when the process `parent`, its parent, ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked to tell
        os._exit(1)


@functools.cache
def forks_end_with_this_process() -> None:
    """From now on, whatever this process forks ends with it."""
    parents: list[int] = []
    os.register_at_fork(
        before=lambda: parents.append(os.getpid()),
        after_in_parent=lambda: parents.clear(),
        after_in_child=lambda: end_with(parents[-1]),
    )


def outlive_signals() -> None:
    """From now on, this process ignores the signals that ask its rank to save and end, which reach all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def serve_a_rank(rank_process: int) -> None:
    """First thing in the helper process of the writers: outlive signals, and end with the rank."""
    outlive_signals()
    end_with(rank_process)
    # What writers send through it is of these types: better imported now than in the first save.
    threading.Thread(target=_import_ahead, daemon=True).start()


def _import_ahead() -> None:
    with suppress(Exception):  # the helper may end in the middle of it
        importlib.import_module("torch.distributed.checkpoint")
