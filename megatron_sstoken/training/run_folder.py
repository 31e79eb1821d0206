"""The folder of a run: one run alone writes to it, and says of itself what it is, in `settings.yaml` and `run.json`.

Both lie in `checkpoint.directory`, or where the logs are, and as they were then in every checkpoint. Of the environment they
hold versions, host and the command's own words; no variables.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

import megatron_sstoken
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.device import device_name
from megatron_sstoken.files import describe_os_error, json_text, read_json, timestamp, write_durably
from megatron_sstoken.folders import RUN_FILE, SETTINGS_FILE
from megatron_sstoken.lock import Lock
from megatron_sstoken.parallel import Layout, broadcast_object
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.training.logger import StepLogger

RUN_FORMAT = 1
_COMPARED = ("data", "selection", "weights", "history", "lora", "optimizer", "training")
"""Sections whose settings TensorBoard compares runs by."""


@contextmanager
def sole_writer(directory: str | None, layout: Layout) -> Iterator[None]:
    """Within, this run alone writes to its checkpoint directory. Raises SettingsError on all ranks if another one does."""
    if directory is None:
        yield
        return
    with Lock(Path(directory) / "run.lock") as lock:
        holder = broadcast_object(lock.take_or_wait() if layout.rank == 0 else None, source=0, group=layout.control)
        if holder is not None:
            raise SettingsError(
                [
                    f"checkpoint.directory={directory} is in use by another run ({holder}): name another one, or stop that run"
                ]
            )
        yield


class RunFolder:
    """Describes this start of a run in its folder: when it begins, and how it has ended. A context manager on all ranks.

    Process 0 writes. What cannot be written is warned of, and ends no run.
    """

    def __init__(self, plan: RunPlan, layout: Layout, *, from_step: int):
        settings = plan.settings
        folder = settings.checkpoint.directory or settings.logging_directory
        self.folder = Path(folder) if folder and layout.rank == 0 else None
        self.step = from_step
        """Steps done."""
        self._num_steps = plan.num_steps
        self._settings = settings
        self._starts: list[dict[str, Any]] = []
        if self.folder is not None:
            self._starts = [*_earlier_starts(self.folder), _describe_start(plan, from_step)]

    def __enter__(self) -> "RunFolder":
        self._write()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._starts:
            ended = "done" if self.step >= self._num_steps else "stopped"
            if error is not None and not isinstance(error, KeyboardInterrupt):
                ended = f"error: {_told(error)}"
            self._starts[-1] |= {"end": timestamp(), "to_step": self.step, "ended": ended}
            self._write()

    def files(self) -> dict[str, str]:
        """Name → text of what a checkpoint of the steps done says of its run; empty but on process 0."""
        if not self._starts:
            return {}
        newest = self._starts[-1] | {"to_step": self.step}
        return {
            SETTINGS_FILE: settings_text(self._settings),
            RUN_FILE: json_text({"format": RUN_FORMAT, "starts": [*self._starts[:-1], newest]}),
        }

    def show(self, logger: StepLogger) -> None:
        """Tell TensorBoard of command, versions and settings, and what to compare the run by."""
        if not self._starts:
            return
        start = self._starts[-1]
        versions = {name: start[name] for name in ("commit", "host", "processes")} | start["versions"]
        rows = "\n".join(f"| {name} | {value} |" for name, value in versions.items())
        logger.text(self.step, "1 command", _code(f"cd {start['working_directory']}\n{shlex.join(start['command'])}"))
        logger.text(self.step, "2 versions", f"| what | version |\n|---|---|\n{rows}")
        logger.text(self.step, "3 settings", _code(settings_text(self._settings)))
        logger.comparable(
            {
                f"{section}.{name}": value if isinstance(value, bool | int | float) else str(value)
                for section in _COMPARED
                for name, value in start["settings"][section].items()
            }
        )

    def _write(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, text in {
                SETTINGS_FILE: settings_text(self._settings),
                RUN_FILE: json_text({"format": RUN_FORMAT, "starts": self._starts}),
            }.items():
                write_durably(self.folder / name, text)
        except OSError as error:
            print(f"warning: the run is not described: {describe_os_error(error)}", file=sys.stderr, flush=True)


def settings_text(settings: Settings) -> str:
    """All settings in force as YAML that `--config` takes."""
    plain = json.loads(json.dumps(asdict(settings), default=str))
    return "# All settings of the run, to be used again with --config.\n" + yaml.safe_dump(
        plain, sort_keys=False, allow_unicode=True
    )


def _earlier_starts(folder: Path) -> list[dict[str, Any]]:
    """Starts that the folder tells of; none where its file is not one of ours."""
    if not (folder / RUN_FILE).is_file():
        return []
    with suppress(ValueError, OSError):
        content = read_json(folder / RUN_FILE)
        starts = content.get("starts")
        if content.get("format") == RUN_FORMAT and isinstance(starts, list):
            return starts
    print(f"warning: {folder / RUN_FILE} cannot be read: it is written anew", file=sys.stderr, flush=True)
    return []


def _describe_start(plan: RunPlan, from_step: int) -> dict[str, Any]:
    settings = plan.settings
    data: dict[str, str | None] = {
        "train": os.path.abspath(settings.data.train or ""),
        "train_fingerprint": plan.train.store.manifest.data_fingerprint,
    }
    if plan.validation is not None:
        data["validation"] = os.path.abspath(settings.data.validation or "")
        data["validation_fingerprint"] = plan.validation.store.manifest.data_fingerprint
    return {
        "command": list(sys.orig_argv),
        "working_directory": os.getcwd(),
        "host": socket.gethostname(),
        "processes": plan.world_size,
        "commit": commit_of(Path(megatron_sstoken.__file__).parent),
        "versions": versions(),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "data": data,
        "start": timestamp(),
        "end": None,
        "from_step": from_step,
        "to_step": None,
        "ended": None,
    }


def versions() -> dict[str, str | None]:
    """What computes: packages, Python, CUDA (None without) and the device of this process."""
    found: dict[str, str | None] = {"megatron_sstoken": megatron_sstoken.__version__}
    found |= {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    with suppress(metadata.PackageNotFoundError):
        found["transformer-engine"] = metadata.version("transformer-engine")
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda, "device": device_name()}


def commit_of(package: Path) -> str | None:
    """The commit that git has of a package's folder, "with changes" where files differ from it; None: git does not know it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not of a repository that it merely lies in
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with changes" if changed else commit


def _told(error: BaseException) -> str:
    """The first line of what is said of an error."""
    if isinstance(error, OSError):
        return describe_os_error(error)
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, SettingsError | FloatingPointError) else f"{type(error).__name__}: {text}"


def _code(text: str) -> str:
    """As a block of Markdown in which nothing is marked."""
    return "\n".join(f"    {line}" for line in text.splitlines())
