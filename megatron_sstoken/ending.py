"""How a program ends: its exit code, and one line that says why."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron_sstoken import watchdog
from megatron_sstoken.command_line import is_first_of_node
from megatron_sstoken.config import SettingsError
from megatron_sstoken.files import describe_os_error
from megatron_sstoken.parallel import is_lost_connection, leave_groups, stop_processes


class _Outliving:
    """A stream that lets nothing be known of a full disk behind it but once, on another one."""

    def __init__(self, stream: Any, name: str, other: Any):
        self._stream, self._name, self._other, self._is_told = stream, name, other, False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                with suppress(OSError):
                    print(f"warning: {self._name}: {error.strerror}: going on without it", file=self._other, flush=True)

    def give_up(self) -> None:
        """Send what is still held back nowhere, if the disk was full: the interpreter flushes once more when it ends."""
        self.flush()
        if self._is_told:
            with suppress(OSError):  # a stream without a file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _outlive_full_logs() -> Iterator[None]:
    """Within, what is printed may get lost where its disk is full; the work goes on."""
    out, err = sys.stdout, sys.stderr
    outliving = _Outliving(out, "standard output", err), _Outliving(err, "standard error", out)
    sys.stdout, sys.stderr = outliving
    try:
        yield
    finally:
        for stream in outliving:
            stream.give_up()
        sys.stdout, sys.stderr = out, err


def run_to_exit_code(body: Callable[[], None], *, debug: bool = False) -> int:
    """Run `body()` in all processes of a job and turn its outcome into an exit code.

    SettingsError (exit code 2) and FloatingPointError (1) are raised alike on all processes and printed by the first of each
    node; the others leave after that, for torchrun ends all processes as soon as one fails. All leave their groups first: a
    process that ends inside them may be aborted by gloo's threads when another one is gone, and then its exit code is a signal.

    What befalls one process alone, such as a full disk, it prints itself, and process 0 repeats it; so the others need not
    say more than that they lost it. A traceback comes with `debug`, and for errors that nobody foresaw.
    """
    with _outlive_full_logs():
        return _run_to_exit_code(body, debug)


def _run_to_exit_code(body: Callable[[], None], debug: bool) -> int:
    is_first = is_first_of_node()
    try:
        body()
    except (SettingsError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        if is_first:
            for problem in error.problems if isinstance(error, SettingsError) else [str(error)]:
                _print_error(f"error: {problem}")
        watchdog.stop()
        leave_groups()
        if not is_first:
            time.sleep(1)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except Exception as error:
        # Nobody leaves the groups here: that would wait for one that is gone.
        if is_lost_connection(error):
            return _lost_connection(debug)
        foreseen = isinstance(error, OSError)
        if debug or not foreseen:
            traceback.print_exc()
        told = describe_os_error(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        _print_error(f"error: process {os.environ.get('RANK', '0')} on {socket.gethostname()}: {told}")
        watchdog.report(told)
        return 1
    watchdog.stop()
    stop_processes()
    return 0


def _lost_connection(debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    fault, is_printed = watchdog.reported(wait=3)
    if fault is None:
        _print_error(
            f"error: process {rank} lost the connection to another one, which has ended or cannot be reached; the output of "
            "its node says why. Checkpoints so far are whole: start the same command on all nodes again to go on from the "
            "newest."
        )
    elif not is_printed:
        _print_error(f"error: {fault}" if rank == "0" else f"process {rank} ends because of {fault}")
    return 1


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
