"""Stopping between two steps when the machine is about to be taken away (Slurm's time limit or preemption, a user's kill)."""

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_IMPATIENT = 3.0
"""Seconds after which another Ctrl-C is one of its own: a terminal and torchrun both pass the first on."""


class StopRequest:
    """While entered, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C do not end this process but ask it to stop after its step.

    torchrun passes SIGTERM on to its processes, and kills them `--shutdown-timeout` seconds (30) later. The signal may
    reach some processes only, or in different steps: they must agree on where to stop.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        # What is ignored stays so: nohup ignores SIGHUP, and a shell's background jobs Ctrl-C.
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and time.monotonic() - self._when > _IMPATIENT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        if self.received is None:
            self._when = time.monotonic()
        self.received = signal.Signals(number).name
