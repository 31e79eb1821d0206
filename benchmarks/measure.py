"""How things are measured: variants that alternate, memory and operations by count, rows that say where they come from."""

import csv
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megatron_sstoken.device import synchronize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("SSTOKEN_RESULTS", ROOT / "benchmarks" / "results"))


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant in every round, and of the baseline in the same rounds."""

    seconds: np.ndarray
    baseline: np.ndarray

    def columns(self) -> dict[str, float]:
        """Median, p20 and p80 of the seconds and of the ratio to the baseline."""
        columns = {}
        for name, values in (("seconds", self.seconds), ("ratio", self.seconds / self.baseline)):
            for suffix, quantile in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8)):
                columns[name + suffix] = float(f"{np.quantile(values, quantile):.4g}")
        return columns


@dataclass
class Counts:
    """What one run of a variant computes and holds."""

    peak_bytes: int = 0
    """Most bytes of tensors allocated during the run and alive at once."""
    product_flops: int = 0
    """Operations of matrix products, two for a multiplication and addition; attention kernels are not counted."""


def alternate(variants: Mapping[str, Callable[[], Any]], rounds: int, baseline: str | None = None) -> dict[str, Timing]:
    """Run every variant once a round, in turning order, after a round of warm-up; all ranks call it.

    What else the machine does hits all variants alike, so that ratios within a round are what counts.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed = seconds_of(variants[name])
            if number:
                seconds[name].append(elapsed)
    reference = np.array(seconds[baseline or names[0]])
    return {name: Timing(np.array(values), reference) for name, values in seconds.items()}


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, until all ranks and their devices are done."""
    _wait_for_all()
    begun = time.perf_counter()
    function()
    _wait_for_all()
    return time.perf_counter() - begun


def _wait_for_all() -> None:
    synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def count(function: Callable[[], Any]) -> Counts:
    """Peak memory and matrix products of one call on this rank, from torch's allocator events and dispatcher."""
    # In-place addmm is what accumulates weight gradients; torch's table has only the one that returns a new tensor.
    mapping = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event["name"] == "[memory]"]
    return Counts(_peak(events), counter.get_total_flops())


def _peak(events: list[dict]) -> int:
    """Largest sum of bytes allocated and not yet freed; what was there before the trace does not count."""
    live, total, peak = {}, 0, 0
    for event in sorted(events, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= live.pop(address, 0)
    return peak


@dataclass
class Rows:
    """Collects the rows of a suite and appends them to `benchmarks/results/<suite>.csv`; rank 0 writes and prints."""

    suite: str
    config: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: str, variant: str, timing: Timing | None = None, counts: Counts | None = None, **more: Any):
        """A row: `case` says what is varied besides the variants that alternate."""
        row = {"case": case, "variant": variant, "rounds": 0 if timing is None else len(timing.seconds)}
        row |= {} if timing is None else timing.columns()
        row |= {} if counts is None else vars(counts)
        self.rows.append(row | more)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(", ".join(f"{name} {value}" for name, value in self.rows[-1].items()), flush=True)

    def append(self, folder: Path = RESULTS) -> None:
        """Write the rows; a file whose columns differ is an error, not a mixture."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        where = environment()
        header = [*where, "config", *names]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.suite}.csv"
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                existing = next(csv.reader(file))
            if existing != header:
                raise ValueError(f"{path} has columns {existing}, this run {header}: move it away")
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header, restval="")
            if new:
                writer.writeheader()
            for row in self.rows:
                writer.writerow(where | {"config": json.dumps(self.config, sort_keys=True)} | row)
        print(f"{len(self.rows)} rows appended to {path}")


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this run."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": described.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "hardware": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
