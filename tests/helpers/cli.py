"""Run the programs as users do, and read what they leave."""

import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sstoken.training.tags import tag_of

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's environment, with the repository importable and one thread a process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launch_command(num_ranks: int, module: str, *arguments: str) -> list[str]:
    """N processes of a module on this machine, on a free port, as the launchers start them."""
    launcher = [sys.executable, "-m", "megatron_sstoken.launch", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, "-m", module, *arguments]


def run(command: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    """Run to the end and return output and exit code."""
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def settings_arguments(settings) -> list[str]:
    """A Settings object as command-line overrides, None left out."""
    return [
        f"--{section}.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for section, group in vars(settings).items()
        for name, value in vars(group).items()
        if value is not None
    ]


def scalars(directory: Path, name: str) -> dict[int, float]:
    """All TensorBoard points of one metric under a folder: step → value; a later run wins."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag_of(name))}
