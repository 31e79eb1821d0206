"""From tasks to results on disk: each task is a process of its own; what is done is not done again."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.evidence.arms import REFERENCE, Task
from benchmarks.evidence.data import Folders, make_data, plain_rows_of
from benchmarks.evidence.model import smollm2
from benchmarks.evidence.scale import Scale

ROOT = Path(__file__).resolve().parent.parent.parent
OF_DEVICE = {"cpu": {"SSTOKEN_DEVICE": "cpu"}, "cuda": {}}
"""Variables of a run's environment. Attention that adds in the same order each time: equal runs then have equal weights."""


class OutOfBudget(Exception):
    """The time is over; what is done stays."""


@dataclass
class Runs:
    """Where results lie, and how tasks become results."""

    work: Path
    gsm8k: Path
    scale: Scale
    device: Literal["cpu", "cuda"]
    backend: str
    """`model.backend`."""
    jobs: int
    deadline: float
    """By `time.monotonic`."""

    def __post_init__(self) -> None:
        path, described = self.work / "scale.json", asdict(self.scale) | {"device": self.device}
        self.work.mkdir(parents=True, exist_ok=True)
        if path.is_file() and json.loads(path.read_text()) != described:
            raise ValueError(f"{self.work} holds results of other sizes: {path} says which; name another folder")
        path.write_text(json.dumps(described))

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
        return make_data(self.work / "data", self.gsm8k, self.model, self.scale, task.noise, task.seed)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run what is missing, `jobs` at once, and what it needs before. Raises OutOfBudget where the time is over first."""
        wanted = list(dict.fromkeys(one for task in tasks for one in (*task.prerequisites, task)))
        missing = [task for task in wanted if self.result(task) is None]
        self._make_data(missing)
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

    def _make_data(self, tasks: Sequence[Task]) -> None:
        """All data that is missing, `jobs` at once after the first, which makes what all share."""
        both = list(dict.fromkeys((task.noise, task.seed) for task in tasks))
        arguments = self.work / "data", self.gsm8k, self.model, self.scale
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("fork")) as pool:
            for part in both[:1], both[1:]:
                for made in [pool.submit(make_data, *arguments, *one) for one in part]:
                    made.result()

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
        folder, data, scale = self._folder(task), self.folders(task), self.scale
        reference = {"history.hf_path": str(self.weights_of(task.reference))} if task.reference else {}
        return {
            "model.hf_path": str(self.model),
            "data.train": str(data.clean_tenth if task.arm is REFERENCE else data.train),
            "model.backend": self.backend,
            "data.sequence_length": scale.sequence_length,
            "optimizer.learning_rate": self._rate(task),
            "optimizer.warmup_fraction": 0.1,
            "training.precision": scale.precision,
            "training.micro_batch_size": scale.packs,
            "training.global_batch_size": scale.packs,
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
        is_asked = bool(task.is_asked and self.scale.asked)
        description = {
            "changes": self.changes(task),
            "measured": {} if is_reference else {"clean": str(data.validation), "prose": str(data.prose)},
            "before": task.arm.measures_before,
            "ask_before": task.arm.measures_before and task.seed == 0,
            "probe": str(data.probe),
            "probes": task.probes,
            "tokenizer": str(self.model),
            "export": str(self.weights_of(task)) if is_reference or is_asked else None,
            "questions": str(plain_rows_of(data.validation)) if is_asked else None,
            "asked": self.scale.asked,
            "threads": max(1, (os.cpu_count() or 1) // self.jobs),
        }
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "task.json"
        described.write_text(json.dumps(description, indent=1))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(description["threads"])}
        own |= OF_DEVICE[self.device]
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "benchmarks.evidence.train", str(described)]
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
