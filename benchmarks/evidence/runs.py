"""From tasks to results on disk: each task is a process of its own; what is done is not done again."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.evidence.arms import REFERENCE, Task
from benchmarks.evidence.data import Folders, Sizes, make_data
from benchmarks.evidence.model import smollm2

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST = 400
"""Characters of question and answer together."""
SEQUENCE_LENGTH = 512
"""Tokens of a pack: about four problems, so that little of it is padding."""
PACKS = {"cpu": 1, "cuda": 4}
"""Of an optimizer step: small ones on a CPU, where there are few problems, so that there are steps enough to learn."""


class OutOfBudget(Exception):
    """The time is over; what is done stays."""


@dataclass
class Runs:
    """Where results lie, and how tasks become results."""

    work: Path
    gsm8k: Path
    sizes: Sizes
    device: Literal["cpu", "cuda"]
    jobs: int
    deadline: float
    """By `time.monotonic`."""

    @property
    def model(self) -> Path:
        return smollm2(self.work / "model" / "hf")

    def result(self, task: Task) -> dict[str, Any] | None:
        """What a task found; None: it is not done."""
        path = self._folder(task) / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def probes(self, task: Task) -> list[Path]:
        """The probe's tokens at the times at which the task scores it."""
        return [self._folder(task) / f"probe_{time}.parquet" for time in task.probes]

    def folders(self, task: Task) -> Folders:
        """The data of a task, made if need be."""
        return make_data(self.work / "data", self.gsm8k, self.model, self.sizes, task.noise, task.seed, LONGEST)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run what is missing, `jobs` at once, and what it needs before. Raises OutOfBudget where the time is over first."""
        wanted = list(dict.fromkeys(one for task in tasks for one in (*task.prerequisites, task)))
        missing = [task for task in wanted if self.result(task) is None]
        running: dict[Task, subprocess.Popen] = {}
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="run", desc="evidence", smoothing=0)
        try:
            while missing or running:
                if time.monotonic() > self.deadline:
                    raise OutOfBudget
                ready = [task for task in missing if all(self.result(one) for one in task.prerequisites)]
                for task in ready[: self.jobs - len(running)]:
                    missing.remove(task)
                    running[task] = self._start(task)
                time.sleep(0.5)
                for task, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[task]
                    if process.returncode:
                        raise RuntimeError(f"{task.name} failed: {self._folder(task) / 'log.txt'} says why")
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
            bar.close()

    def weights_of(self, task: Task) -> Path:
        """Hugging Face folder of the weights that a task ended with, where it keeps them."""
        return self._folder(task) / "hf"

    def _rate(self, task: Task) -> float:
        if task.rate_from is None:
            return task.learning_rate
        found = self.result(task.rate_from)
        assert found is not None, "it is a prerequisite"
        return task.learning_rate * statistics.mean(step["weight_mean"] for step in found["train"])

    def _folder(self, task: Task) -> Path:
        return self.work / "runs" / task.name

    def changes(self, task: Task) -> dict[str, Any]:
        """What a task sets beside the defaults. Its prerequisites are done."""
        folder, data, on_cpu = self._folder(task), self.folders(task), self.device == "cpu"
        reference = {"history.hf_path": str(self.weights_of(task.reference))} if task.reference else {}
        return {
            "model.hf_path": str(self.model),
            "data.train": str(data.clean_tenth if task.arm is REFERENCE else data.train),
            "data.sequence_length": SEQUENCE_LENGTH,
            "optimizer.learning_rate": self._rate(task),
            "optimizer.warmup_fraction": 0.1,
            "training.precision": "fp32" if on_cpu else "bf16",
            "training.micro_batch_size": PACKS[self.device],
            "training.global_batch_size": PACKS[self.device],
            "training.epochs": task.arm.epochs,
            "training.seed": 1234 + task.seed,
            "checkpoint.directory": str(folder / "run"),
            "checkpoint.save_every": 0,
            "logging.directory": str(folder / "logs"),
            "logging.entropy": bool(task.probes),
            **task.arm.changes,
            **reference,
        }

    def _start(self, task: Task) -> subprocess.Popen:
        folder, data, is_reference = self._folder(task), self.folders(task), task.arm is REFERENCE
        description = {
            "changes": self.changes(task),
            "measured": {} if is_reference else {"clean": str(data.validation), "prose": str(data.prose)},
            "before": task.arm.measures_before,
            "probe": str(data.probe),
            "probes": task.probes,
            "tokenizer": str(self.model),
            "export": str(self.weights_of(task)) if is_reference else None,
            "threads": max(1, (os.cpu_count() or 1) // self.jobs),
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "task.json"
        path.write_text(json.dumps(description, indent=1))
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(description["threads"])}
        own |= {"SSTOKEN_DEVICE": "cpu"} if self.device == "cpu" else {}
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "benchmarks.evidence.train", str(path)]
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
