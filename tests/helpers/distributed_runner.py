"""One helper: run a function on N processes joined by gloo, and get what each returned."""

import contextlib
import functools
import itertools
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_PRELOADED = [
    "tests.helpers.workbench",
    "megatron_sstoken.training.loop",
    "megatron_sstoken.conversion.hf",
    "megatron_sstoken.train",
    "megatron_sstoken.ending",  # and what else the programs import once the settings are read
    "megatron_sstoken.validate.agree",
    "megatron_sstoken.training.next_commands",
]
_START = random.randrange(10_000, 32_768)
_ports = itertools.cycle([*range(_START, 32_768), *range(10_000, _START)])
"""Below those that Linux gives to whoever asks for any port; each process of the tests begins at another one."""


def run_distributed(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120,
    before: Callable[[], None] | None = None,
    preloaded: bool = True,
) -> list[Any]:
    """Call `function(rank, *args)` on `num_ranks` fresh processes with torch.distributed (gloo) initialised.

    `function` must be importable (top level of a module). Returns the results in rank order. A rank that raises takes
    the others down at once and its traceback is in the AssertionError; so is the time limit (`timeout` in seconds).
    `before` is called in each process first of all. Without `preloaded` each begins with no library imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        port, context = free_port(), preloaded_context() if preloaded else mp.get_context("spawn")
        processes = [
            context.Process(
                target=_rank_main, args=(rank, num_ranks, port, folder, function, args, before), daemon=False
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_load(os.path.join(folder, f"result-{rank}")) for rank in range(num_ranks)]


def free_port() -> int:
    """A port on which nothing listens now, and which nobody is likely to take before it is used."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@functools.lru_cache(maxsize=1)
def preloaded_context() -> Any:
    """Processes forked from a server that has imported the libraries once: imports take longer than most tests.

    The server has no threads and no process groups. It starts with the environment of this moment.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _wait(processes: list, folder: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if failed := [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]:
        time.sleep(0.2)
        # A rank may end because another one has: the first to write down its error is the cause.
        told = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        rank = int(told[0].name.removeprefix("error-")) if told else failed[0]
        reason = told[0].read_text() if told else f"exit code {processes[rank].exitcode}"
        raise AssertionError(f"rank {rank} of {len(processes)} failed:\n{reason}")
    waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if waiting:
        raise AssertionError(f"ranks {waiting} did not finish within {timeout} s")


def _rank_main(
    rank: int,
    num_ranks: int,
    port: int,
    folder: str,
    function: Callable,
    args: tuple,
    before: Callable[[], None] | None,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        if before is not None:
            before()
        from megatron_sstoken.parallel import start_processes, stop_processes

        start_processes(timeout_minutes=2)
        result = function(rank, *args)
        with open(os.path.join(folder, f"result-{rank}"), "wb") as file:
            pickle.dump(result, file)
        stop_processes()
    except BaseException:
        with open(os.path.join(folder, f"error-{rank}"), "w") as file:
            file.write(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)


def _load(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)
