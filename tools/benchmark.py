#!/usr/bin/env python3
"""Measure what docs/performance.md claims: `python tools/benchmark.py --suite head --gsm8k FOLDER --work FOLDER`.

Variants alternate within a run, so that ratios hold on a busy machine. Every measurement is a row of
benchmarks/results/<suite>.csv: median, p20 and p80, ratio to the first variant, peak memory and operations by count, commit,
versions, hardware, configuration. Under torchrun all processes are tensor parallel (step, scoring, selection, head,
history).
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.suites import SUITES, prepared  # noqa: E402
from benchmarks.workload import Options, Shape  # noqa: E402
from megatron_sstoken.parallel import start_processes, stop_processes  # noqa: E402

ONE_PROCESS = ("huggingface", "prepare", "convert")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", required=True, choices=SUITES, help="what to measure")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder for model and data, kept for the next run")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one of warm-up (default 5)")
    parser.add_argument("--problems", type=int, default=64, help="problems of GSM8K to train on (default 64)")
    parser.add_argument("--threads", type=int, help="of each process; default: the cores divided by the processes")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model (default {value})")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the suites one after another; the exit status."""
    options = parse_arguments(arguments)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problem = None
    if not (options.gsm8k / "train.jsonl").is_file():
        problem = f"--gsm8k: {options.gsm8k} holds no train.jsonl"
    elif world_size > 1 and (alone := [suite for suite in options.suite if suite in ONE_PROCESS]):
        problem = f"--suite {' '.join(alone)} runs in one process, not in {world_size}: start it without torchrun"
    elif options.rounds < 1:
        problem = f"--rounds {options.rounds}: use 1 or more"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads or max((os.cpu_count() or 1) // world_size, 1))
    shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})
    measured = Options(options.gsm8k, options.work, options.rounds, shape, options.problems)
    start_processes()
    prepared(measured)
    for suite in options.suite:
        SUITES[suite](measured)
    stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
