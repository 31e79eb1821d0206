"""Bounds for chat templates: programs that come with somebody's tokenizer, and may run for ever or fill the memory."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

SECONDS = 10.0
"""Longest time that a template may take for one conversation."""
MEMORY = 8 << 30
"""Bytes of data that a process which renders may hold."""


class BadTemplate(ValueError):
    """A chat template that cannot be used for any row."""


def size_limit(content: int) -> int:
    """Characters that a template may make of a conversation with `content` characters."""
    return 100 * content + (1 << 20)


_listening = False


@contextmanager
def listening() -> Iterator[None]:
    """Within, in the main thread, `time_limit` need not say each time who hears its alarm."""
    global _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_long)
    _listening = True
    try:
        yield
    finally:
        _listening = False
        signal.signal(signal.SIGALRM, before)


@contextmanager
def time_limit() -> Iterator[None]:
    """Within, BadTemplate is raised after `SECONDS`; in the main thread, where alone Python hears an alarm."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with nullcontext() if _listening else listening():
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise BadTemplate(f"the chat template takes longer than {SECONDS:g} s for one conversation: use another template")


@contextmanager
def memory_limit() -> Iterator[None]:
    """Within, this process cannot hold more than `MEMORY`: what wants more raises MemoryError."""
    before = limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def limit_memory() -> tuple[int, int]:
    """Limit this process for good; returns the limits before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = [limit for limit in (MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted), hard))
    return soft, hard
