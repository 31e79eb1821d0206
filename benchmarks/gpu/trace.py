"""Where a step's time goes: a profiler's trace, the lines of ours at which the host waits, and how long the GPU idles."""

import collections
import gzip
import json
import os
import statistics
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import Results
from benchmarks.gpu.runs import make_trainer, settings_for
from benchmarks.measure import seconds_of
from megatron_sstoken.device import have_cuda
from megatron_sstoken.training.loop import training_step

STEP = "measured step"
TOP = 12
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
SYNC = "synchronizing CUDA operation"
OURS = f"{os.sep}megatron_sstoken{os.sep}"


def run(results: Results) -> None:
    """1B at 4,096 tokens, two micro-batches a step, ssToken."""
    trainer = make_trainer(settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, rows=2))
    numbers = count()

    def step() -> None:
        training_step(trainer, next(numbers))

    for _ in range(1 if results.tiny else 3):
        step()
    seconds = [seconds_of(step) for _ in range(1 if results.tiny else 5)]
    if have_cuda():
        with counted_waits() as waits:
            step()
        table = f"waits of the host in a step of {trainer.plan.shape.num_micro_batches} micro-batches"
        for place, number in [("all", sum(waits.values())), *waits.most_common()]:
            results.row(table, line=place, number=number)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * have_cuda()
    with profile(activities=activities) as profiler, torch.profiler.record_function(STEP):
        seconds_of(step)
    path = results.folder / "trace_1b.json.gz"
    profiler.export_chrome_trace(str(path))
    results.row("trace (open it in ui.perfetto.dev)", file=path.name, MiB=path.stat().st_size / 2**20)
    if not have_cuda():
        results.absent("waits of the host, idle share, kernels", "this machine has no CUDA device")
        return
    kernels = read_kernels(path)
    wall, busy = statistics.median(seconds), busy_seconds(kernels)
    results.row(
        "a step", **{"s without profiler": wall, "s in which kernels run": busy, "idle share": 1 - busy / wall},
        kernels=len(kernels),
    )  # fmt: skip
    for row in longest(kernels):
        results.row("the longest kernels", **row)


@contextmanager
def counted_waits() -> Iterator[collections.Counter[str]]:
    """Within, what makes the host wait for the GPU is counted by the two innermost lines of ours (or whoever's)."""
    counts: collections.Counter[str] = collections.Counter()

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if SYNC in str(message):
            counts[" ← ".join(_lines_of_ours()) or f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _lines_of_ours() -> list[str]:
    """The calls of this package under way, the innermost two."""
    calls = [call for call in traceback.extract_stack() if OURS in call.filename][-2:]
    return [f"{call.filename.rsplit(OURS, 1)[1]}:{call.lineno} {call.name}" for call in reversed(calls)]


def read_kernels(path: Path) -> list[dict[str, Any]]:
    """What ran on the device, of a trace's events: name, start and duration in µs."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") in ON_DEVICE and "dur" in event]


def busy_seconds(kernels: list[dict[str, Any]]) -> float:
    """Seconds in which at least one of them runs."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        stop = kernel["ts"] + kernel["dur"]
        busy += max(stop - max(kernel["ts"], end), 0.0)
        end = max(end, stop)
    return busy / 1e6


def longest(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By name, those that take most time together, and their share of all."""
    seconds: collections.Counter[str] = collections.Counter()
    calls = collections.Counter(kernel["name"] for kernel in kernels)
    for kernel in kernels:
        seconds[kernel["name"]] += kernel["dur"]
    whole = sum(seconds.values()) or 1
    return [
        {"kernel": name[:90], "calls": calls[name], "ms": time / 1e3, "share": time / whole}
        for name, time in seconds.most_common(TOP)
    ]
