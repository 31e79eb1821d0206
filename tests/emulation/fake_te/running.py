"""Runs a function on several processes that believe they have GPUs and Transformer Engine.

Nothing here, nor what it imports, may import megatron-core: that looks for Transformer Engine once, when it is imported.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from tests.emulation.connections import replace
from tests.emulation.fake_te import installation
from tests.emulation.running import become_pretended
from tests.helpers.distributed_runner import run_distributed


def run_with_fake_te(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 300) -> list[Any]:
    """As `run_distributed`, each process on a pretended device of its own, with Transformer Engine's Python on it."""
    place = (function.__module__, function.__qualname__)
    return run_distributed(_call, num_ranks, *place, *args, timeout=timeout, before=become_ready, preloaded=False)


def become_ready() -> None:
    """Turn this process into one with a pretended device and Transformer Engine."""
    become_pretended(also=installation.install)
    for name in ("isend", "irecv"):
        replace(name, _to_be_waited_for_again(getattr(dist, name)))


def _to_be_waited_for_again(send_or_receive: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL's messages may be waited for twice, as the ring of context parallel does; a second wait for gloo's never ends."""

    @functools.wraps(send_or_receive)
    def start(*args: Any, **kwargs: Any) -> Any:
        return _Message(send_or_receive(*args, **kwargs))

    return start


class _Message:
    def __init__(self, work: Any):
        self._work, self._is_waiting = work, True

    def wait(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._work.wait()


def _call(rank: int, module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(module), name)(rank, *args)
