"""Start a program of the package as torchrun would, in processes forked from one that has imported everything."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.distributed_runner import free_port, preloaded_context


@dataclass
class Program:
    """Processes of one job, whose output goes to files."""

    processes: list[Any]
    folder: Path

    def wait(self, timeout: float = 100) -> list[tuple[int, str]]:
        """Exit code and output of each process; those that do not end in time are killed, and fail."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        outputs = [(self.folder / f"rank{rank}.txt").read_text(errors="replace") for rank in range(len(self.processes))]
        assert not hanging, f"processes {hanging} do not end: {outputs}"
        return [(process.exitcode, output) for process, output in zip(self.processes, outputs, strict=True)]

    def members(self) -> list[psutil.Process]:
        """Living processes of the job's sessions, wherever they hang now: whose parent is gone belongs to init."""
        sessions = {process.pid for process in self.processes}
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            try:
                if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def left(self, within: float = 10) -> list[psutil.Process]:
        """The members that are still there after so many seconds."""
        deadline = time.monotonic() + within
        while (found := self.members()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def output(self, rank: int = 0) -> str:
        """What a process has printed so far."""
        path = self.folder / f"rank{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""


def start(
    module: str,
    arguments: list[str] | list[list[str]],
    num_ranks: int,
    folder: Path,
    *,
    before: Callable[[int], None] | None = None,
) -> Program:
    """Call `main(arguments)` of a module on each rank, or on each with its own.

    `before(rank)`, importable, is called first: to bring a fault about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, port = preloaded_context(), free_port()
    places = [(rank, num_ranks, port) for rank in range(num_ranks)]
    processes = [
        context.Process(target=_rank_main, args=(place, module, arguments, folder, before)) for place in places
    ]
    for process in processes:
        process.start()
    return Program(processes, folder)


def run(module: str, arguments: list[str], num_ranks: int, timeout: float = 100) -> subprocess.CompletedProcess:
    """Start a program and wait for it: the first exit code that is not 0, and what all ranks printed, on stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        ended = start(module, arguments, num_ranks, Path(folder)).wait(timeout)
    output = "".join(text for _, text in ended)
    code = next((code for code, _ in ended if code), 0)
    return subprocess.CompletedProcess([module, *arguments], code, output, output)


def _rank_main(place: tuple, module: str, arguments: list, folder: Path, before: Callable | None) -> None:
    import importlib

    rank, num_ranks, port = place
    os.setsid()
    output = os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    os.environ.update(where | {"LOCAL_WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)})
    if before is not None:
        before(rank)
    mine = arguments[rank] if isinstance(arguments[0], list) else arguments
    raise SystemExit(importlib.import_module(module).main(mine))
