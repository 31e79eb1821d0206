"""What each process of a job finds out about its machine and its links to others."""

import datetime
import os
import platform
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sstoken.device import communication_backend, compute_device, have_cuda, synchronize
from megatron_sstoken.doctor import diagnose, examine, version_of
from megatron_sstoken.files import existing_above
from megatron_sstoken.preflight.findings import PATIENCE, Facts

VISIBLE = 10.0
"""Seconds that a network file system may take to show a new file on another machine."""


@dataclass
class _Job:
    """This process's place in the job, and the groups that it measures in."""

    rank: int
    node: int
    nodes: list[int]
    """The machine of each process."""
    hung: bool = False

    @property
    def is_first_of_node(self) -> bool:
        return self.nodes.index(self.node) == self.rank

    @property
    def leaders(self) -> list[int]:
        """First process of each machine."""
        return [self.nodes.index(node) for node in dict.fromkeys(self.nodes)]


def look(folder: str) -> tuple[list[Facts], bool]:
    """Facts of all processes, on each of them, and whether something hangs in this one. All processes call it, initialised."""
    rank = dist.get_rank()
    node = int(os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", "0")))
    job = _Job(rank, node, _gathered(node))
    shared = _share(job, folder)
    clock = _clock(job)
    speeds = _measure(job)
    examined: tuple[tuple[str, str], ...] = ()
    if job.is_first_of_node:
        found = diagnose(examine(existing_above(folder)))
        examined = (*(("error", text) for text in found.errors), *(("warning", text) for text in found.warnings))
    gpu = torch.cuda.get_device_properties(compute_device()) if have_cuda() else None
    own = Facts(
        rank=rank,
        node=node,
        host=socket.gethostname(),
        versions=versions(),
        gpu=gpu.name if gpu else None,
        gpu_bytes=gpu.total_memory if gpu else 0,
        speeds=speeds,
        clock=clock,
        disk=shutil.disk_usage(existing_above(folder)).free,
        folder_problem=shared,
        doctor=examined,
    )
    return _gathered(own), job.hung


def versions() -> dict[str, str | None]:
    """What has to be equal on all machines, and the driver."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d[\d.]*)\s", driver.read_text()) if driver.exists() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if have_cuda() else None
    packages = {name: version_of(name) for name in ("megatron-core", "transformer-engine", "megatron-sstoken")}
    here = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "NCCL": nccl,
    }
    return here | packages | {"NVIDIA driver": found and found[1]}


def _gathered(value: Any) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _share(job: _Job, folder: str) -> str:
    """Why this machine does not see what process 0 writes into the folder; '' if it does."""
    box = [f"{uuid.uuid4().hex}"]
    dist.broadcast_object_list(box)
    probe, problem = Path(folder) / f".preflight-{box[0]}", ""
    made = job.rank == 0 and not probe.parent.exists()
    if job.rank == 0:
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_text(box[0])
        except OSError as error:
            problem = f"{folder} cannot be written ({error.strerror})"
    dist.barrier()
    if job.rank != 0 and job.is_first_of_node:
        until = time.monotonic() + VISIBLE
        while not probe.exists() and time.monotonic() < until:
            time.sleep(0.2)
        if not probe.exists():
            problem = f"{folder} does not show within {VISIBLE:.0f} s what process 0 writes there"
    dist.barrier()
    if job.rank == 0 and not problem:
        probe.unlink(missing_ok=True)
        if made and not any(probe.parent.iterdir()):
            probe.parent.rmdir()
    return problem


def _clock(job: _Job) -> float:
    """Seconds that this machine's clock is ahead of process 0's, as NTP asks: the answer of the shortest way there and back."""
    ahead, now = 0.0, torch.zeros(1, dtype=torch.float64)
    for leader in job.leaders[1:]:
        samples = []
        for _ in range(5):
            if job.rank == 0:
                sent = time.time()
                dist.send(now, leader)
                dist.recv(now, leader)
                back = time.time()
                samples.append((back - sent, float(now) - (sent + back) / 2))
            elif job.rank == leader:
                dist.recv(now, 0)
                now[0] = time.time()
                dist.send(now, 0)
        if job.rank == 0:
            dist.send(torch.tensor([min(samples)[1]], dtype=torch.float64), leader)
        elif job.rank == leader:
            dist.recv(now, 0)
            ahead = float(now)
    return ahead


def _measure(job: _Job) -> dict[str, float]:
    """Bandwidths in GB/s, and on GPUs the rate of a matrix product in TFLOP/s. All processes call it."""
    speeds: dict[str, float] = {}
    for node in dict.fromkeys(job.nodes):
        members = [rank for rank, other in enumerate(job.nodes) if other == node]
        if len(members) > 1:
            _time_group(job, members, "within", speeds)
    leaders = job.leaders
    # Each machine with its next, pairs apart from each other at once: what is slow with both neighbours is slow itself.
    for start in (0, 1):
        for first in range(start, len(leaders) - 1, 2):
            _time_group(job, leaders[first : first + 2], "between", speeds)
    if have_cuda():
        speeds["matrix"] = _matrix_rate()
    return speeds


def _time_group(job: _Job, members: list[int], name: str, speeds: dict[str, float]) -> None:
    """Measure an all-reduce among `members`; the best of several measurements stays. Every process calls it."""
    group = dist.new_group(members, backend=communication_backend(), timeout=datetime.timedelta(seconds=PATIENCE))
    if job.rank not in members or job.hung:
        return
    speed = _within_time(lambda: _bus_bandwidth(group, len(members)))
    job.hung |= speed is None
    speeds[name] = max(speeds.get(name, 0.0), speed or 0.0)


def _within_time(measure: Callable[[], float]) -> float | None:
    """What `measure` returns; None if it has not ended in time, or failed. NCCL blocks where it connects."""
    result: list[float] = []

    def body() -> None:
        if have_cuda():
            torch.cuda.set_device(compute_device())
        try:
            result.append(measure())
        except RuntimeError as error:
            print(f"process {dist.get_rank()}: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE + 10)
    return result[0] if result else None


def _bus_bandwidth(group: dist.ProcessGroup, size: int) -> float:
    """GB/s that each link carries in an all-reduce over `size` ranks: 2 (n − 1) / n of the bytes, as nccl-tests counts."""
    numbers, times = (1 << 26, 10) if have_cuda() else (1 << 20, 3)  # fp32
    buffer = torch.ones(numbers, device=compute_device())
    for _ in range(2):
        dist.all_reduce(buffer, group=group)
    synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(buffer, group=group)
    synchronize()
    return 2 * (size - 1) / size * 4 * numbers * times / (time.perf_counter() - begun) / 1e9


def _matrix_rate(side: int = 8192, times: int = 30) -> float:
    """TFLOP/s of a bf16 matrix product, long enough for the GPU's clock to settle."""
    a, b = (torch.randn(side, side, device=compute_device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(times):
        torch.mm(a, b)
    synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        torch.mm(a, b)
    synchronize()
    return 2 * side**3 * times / (time.perf_counter() - begun) / 1e12
