"""Compare the files of any artefact with their checksums, on demand."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sstoken.conversion.work import progress_bar, run_tasks
from megatron_sstoken.files import format_bytes
from megatron_sstoken.integrity import CHECKSUMS, Checksums, differing, read_checksums


@dataclass(frozen=True)
class CheckResult:
    """What `check_folders` found."""

    folders: int
    files: int
    size: int
    """Bytes read."""
    seconds: float
    problems: list[str]
    """A line for each file that is not as it was written."""

    def describe(self) -> str:
        """The result in one line."""
        verdict = f"{len(self.problems)} of {self.files} files are damaged" if self.problems else "whole"
        speed = f"{format_bytes(int(self.size / max(self.seconds, 1e-3)))}/s"
        return f"{verdict}: {self.files} files in {self.folders} folders, {format_bytes(self.size)}, {speed}"


def check_folders(paths: Sequence[Path], workers: int = 2) -> CheckResult:
    """Compare all files below `paths` that a `checksums.json` lists. Raises ValueError for a path without one."""
    folders: list[Path] = []
    for path in paths:
        found = sorted(file.parent for file in path.rglob(CHECKSUMS))
        if not found:
            raise ValueError(f"{path} holds no {CHECKSUMS}, so there is nothing to compare: name a folder that has one")
        folders += found
    tasks: list[tuple[Path, Checksums]] = []
    problems, total = [], 0
    for folder in dict.fromkeys(folders):
        try:
            checksums = read_checksums(folder) or {}
        except ValueError as error:
            problems.append(str(error))
            continue
        tasks += [(folder, {name: checksum}) for name, checksum in checksums.items()]
        total += sum(one["size"] for one in checksums.values())
    begun = time.monotonic()
    with progress_bar(total, 0, "checking") as bar:

        def compare(task: tuple[Path, Checksums], check: Callable[[], None]) -> None:
            problems.extend(differing(*task, bar.update))

        run_tasks(compare, tasks, workers)
    return CheckResult(len(set(folders)), len(tasks), total, time.monotonic() - begun, sorted(problems))
