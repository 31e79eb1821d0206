"""Run shell commands of the documentation as they stand: in a bash, whose `python` forks from a process with all imports.

What does not run as it stands is named in two tables here, and nowhere else: `STUBS` and `TOO_MANY_PROCESSES`. Imports take
longer than all else that a command does with a toy; with `forked=False` each command starts an interpreter of its own.
"""

import contextlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun

from tests.helpers.cli import ROOT
from tests.helpers.distributed_runner import free_port, preloaded_context

LINKED = ("megatron_sstoken", "tools", "pretrain_scripts", "setup.py", "pyproject.toml", "constraints.txt", "README.md")
SMALL = {
    "tools/make_toy.py": ["--rows=60", "--layers=2"],
    "--config pretrain_scripts/configs/quickstart.yaml": [
        "--logging.records_every=4",
        "--training.steps=4",
        "--checkpoint.asynchronous=false",
    ],
}
"""Words of a command → options that make it quick; the quickstart's commands alone have them."""
TOO_MANY_PROCESSES = 2
"""A forked `launch` of more is a dry run of as many instead: that its settings work there is what is seen."""
LAUNCH = "megatron_sstoken.launch"
HUB = "tests.helpers.documented_shell"
STUBS = {
    "tensorboard": 'test -d "${1#--logdir=}" || test -d "$2"',
    "hf": f'exec "{sys.executable}" -m {HUB} "$@"',
    "vllm": 'test -f "$2/config.json"',
    "lm_eval": "true",
}
"""Programs that need a network, a GPU or a browser → what takes their place."""
PYTHON = f"""#!{sys.executable} -SE
import json, os, socket, sys
words = sys.argv[1:]
if words[:2] == ["-m", "pip"]:
    sys.exit(0)
if words[:1] == ["-c"] or not {{forked}}:
    os.execv({sys.executable!r}, [{sys.executable!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({{address!r}})
    asked = {{{{"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "process": os.getpid()}}}}
    server.sendall(json.dumps(asked).encode() + b"\\n")
    sys.exit(int(server.makefile().readline()))
"""
"""`python` of the shell: nothing is installed; a line of code is run by the interpreter itself."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    words: list[str]
    code: int
    seconds: float


@dataclass
class Shell:
    """A scratch copy of the tree with an environment of its own, in which commands are run."""

    root: Path
    forked: bool = True
    ran: list[Ran] = field(default_factory=list)
    """In the order of their ends; of forked ones alone."""

    def __post_init__(self) -> None:
        for name in LINKED:
            (self.root / name).symlink_to(ROOT / name)
        binaries = self.root / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (self.root / "tests").mkdir()
        (self.root / "tests" / "run.sh").write_text("exit 0  # this is one of them\n")
        (binaries / "activate").write_text(f'export PATH="{binaries}:$PATH"\n')
        stubs = {name: f"#!/usr/bin/env bash\n{body}\n" for name, body in STUBS.items()}
        python = PYTHON.format(address=str(self._address), forked=self.forked)
        for name, text in {"python": python, **stubs}.items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)

    @property
    def _address(self) -> Path:
        return self.root / "python.socket"

    def run(self, script: str, timeout: float) -> subprocess.CompletedProcess:
        """Run a script, which ends at the first command that fails and says which it was."""
        guard = "set -Eeuo pipefail; trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SSTOKEN_DEVICE": "cpu", "NO_COLOR": "1"}
        with self._serving():
            process = subprocess.Popen(
                ["bash", "-c", guard + script],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise AssertionError(f"not done after {timeout} s:\n{out[-3000:]}\n{err[-3000:]}") from None
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        self._address.unlink(missing_ok=True)
        lock = threading.Lock()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self._address))
            server.listen()
            threading.Thread(target=self._accept, args=(server, lock), daemon=True).start()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)  # wakes what waits in accept

    def _accept(self, server: socket.socket, lock: threading.Lock) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                threading.Thread(target=self._serve, args=(client, lock), daemon=True).start()

    def _serve(self, client: socket.socket, lock: threading.Lock) -> None:
        """Fork what a client asks for, and tell it the exit code."""
        with client:
            asked = json.loads(client.makefile().readline())
            begun = time.monotonic()
            code = _fork(asked, lock)
            self.ran.append(Ran(asked["words"], code, time.monotonic() - begun))
            with contextlib.suppress(OSError):
                client.sendall(f"{code}\n".encode())


def _fork(asked: dict[str, Any], lock: threading.Lock) -> int:
    """Run a command in processes of the preloaded server; the exit code of the first that fails.

    The lock: multiprocessing's objects are not made for threads.
    """
    words = [
        *asked["words"],
        *(more for mark, options in SMALL.items() if mark in " ".join(asked["words"]) for more in options),
    ]
    places: list[dict[str, str]] = [{}]
    if words[:2] == ["-m", LAUNCH]:
        options = torchrun.get_args_parser().parse_args([word for word in words[2:] if word != "--need-gpus"])
        num = int(options.nproc_per_node)
        words = ["-m", options.training_script, *options.training_script_args]
        if num > TOO_MANY_PROCESSES:
            words += ["--dry_run", f"--world_size={num}"]
        else:
            places = _places(num)
    with lock:
        context = preloaded_context()
        processes = [context.Process(target=_run, args=(words, asked, place)) for place in places]
        for process in processes:
            process.start()
    while True:
        with lock:
            codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.02)
    for process in processes:
        with lock:
            if process.exitcode is None:
                process.kill()
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _places(num: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num)}
    return [shared | {"LOCAL_WORLD_SIZE": str(num), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]


def _run(words: list[str], asked: dict[str, Any], place: dict[str, str]) -> None:
    """In a forked process: be the interpreter that was asked for."""
    _take_streams(asked["process"])
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | place)
    if words[0] == "-m":
        sys.argv = words[1:]
        module = importlib.import_module(words[1])
        main = module.main if hasattr(module, "main") else importlib.import_module(f"{words[1]}.__main__").main
        raise SystemExit(main(words[2:]))
    sys.argv = words
    if words[0] == "tools/prepare_data.py":  # on one core it starts no workers, which would import everything anew
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
    runpy.run_path(words[0], run_name="__main__")


def _take_streams(process: int) -> None:
    """Standard streams become those of another process. Two that are one file stay one, or they would overwrite each other."""
    opened: dict[tuple[int, int], int] = {}
    for number in (0, 1, 2):
        path = f"/proc/{process}/fd/{number}"
        state = os.stat(path)
        file = (state.st_dev, state.st_ino)
        if file not in opened:
            opened[file] = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened[file], number)


def bash_blocks(page: str) -> list[str]:
    """The fenced bash blocks of a page, in order: what is shown in them is there to be run."""
    return re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def _hub(arguments: list[str]) -> None:
    """In place of `hf download NAME --local-dir FOLDER`: the quickstart's toy, in the form of what is asked for."""
    assert arguments[0] == "download", arguments
    folder = Path(arguments[arguments.index("--local-dir") + 1])
    if "--repo-type" not in arguments:
        shutil.copytree("quickstart/toy/model", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
        return
    import pyarrow
    from pyarrow import parquet

    (folder / "main").mkdir(parents=True)
    for split, num in (("train", 400), ("test", 12)):
        rows = [
            {"question": f"What is {one} + 2?", "answer": f"{one} + 2 = {one + 2}\n#### {one + 2}"}
            for one in range(num)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "main" / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    _hub(sys.argv[1:])
