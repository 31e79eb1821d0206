"""Stopping between two steps when the machine is about to be taken away (Slurm's time limit or preemption, a user's kill)."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_sstoken.parallel import Layout

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGTERM and SIGUSR1 do not end this process but ask it to stop after the step it is in.

    torchrun passes SIGTERM on to its processes, and kills them `--shutdown-timeout` seconds (30) later. The signal may
    reach some processes only, or in different steps: `agreed` lets all of them stop after the same one.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self, layout: Layout) -> bool:
        """Whether any process was asked to stop; the same answer on all of them, who all call it."""
        asked = torch.tensor(int(self.received is not None))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=layout.control)
        return bool(asked)
