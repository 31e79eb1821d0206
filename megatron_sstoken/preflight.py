"""Look at the machines of a run by processes started as the run's would be: `launch … -m megatron_sstoken.preflight`.

Compares versions, GPUs and clocks, measures all-reduce within each machine and between neighbours, and looks for disk space and
a folder that all share. Each finding names machine, value, rule and remedy. Exit code 0 if a run can start, 2 if something
would break it. megatron-core is not imported: a broken installation is a finding.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sstoken.device import communication_backend, compute_device, have_cuda, synchronize
from megatron_sstoken.doctor import diagnose, examine, version_of

PATIENCE = 120.0
"""Seconds after which a measurement counts as hanging."""
VISIBLE = 10.0
"""Seconds that a network file system may take to show a new file on another machine."""
CLOCKS = 1.0
"""Seconds that clocks may differ."""
SLOW_WITHIN, SLOW_BETWEEN = 20.0, 5.0
"""GB/s (bus bandwidth of an all-reduce over NCCL) below which a link is not what GPUs of a data centre have: about PCIe 3.0
within a machine, and 40 Gbit/s between machines."""
LAGS = {"within": 0.5, "between": 0.5, "matrix": 0.9}
"""Fraction of the median below which one machine is slower than the others."""
_TO_AGREE = ("python", "torch", "CUDA of torch", "NCCL", "megatron-core", "transformer-engine", "megatron-sstoken")


@dataclass(frozen=True)
class Facts:
    """What one process found out. Tests make their own."""

    rank: int
    node: int
    """Number of its machine."""
    host: str
    versions: dict[str, str | None]
    gpu: str | None = None
    gpu_bytes: int = 0
    speeds: dict[str, float] = field(default_factory=dict)
    """within, between: bus bandwidth in GB/s, 0 where it hung; matrix: TFLOP/s in bf16. Of GPUs, or over gloo of CPUs."""
    clock: float = 0.0
    """Seconds ahead of process 0."""
    disk: int = 0
    """Bytes free where checkpoints go; whether it is enough, the doctor says."""
    folder_problem: str = ""
    """Why this machine does not share the folder; '' if it does."""
    doctor: tuple[tuple[str, str], ...] = ()
    """The doctor's errors and warnings: kind and text; of the first process of a machine."""


@dataclass(frozen=True)
class Finding:
    """Something about one machine that breaks a run (error) or slows it (warning)."""

    kind: str
    where: str
    problem: str
    """Value and rule."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.problem}" + (f": {self.remedy}" if self.remedy else "")


def judge(facts: list[Facts], folder: str) -> list[Finding]:
    """What follows from the facts of all processes, in order of rank; errors first."""
    firsts = first_of_each(facts)
    found = [Finding(kind, name_of(one), text, "") for one in firsts for kind, text in one.doctor]
    found += _judge_versions(firsts) + _judge_gpus(facts) + _judge_speeds(facts)
    for one in firsts:
        name = name_of(one)
        if one.folder_problem:
            found.append(
                Finding("error", name, one.folder_problem, f"mount it there, or name another --folder than {folder}")
            )
        if abs(one.clock) > CLOCKS:
            problem = f"its clock is {one.clock:+.1f} s from {name_of(firsts[0])}'s, more than {CLOCKS:.0f} s"
            found.append(Finding("warning", name, problem, "start chronyd or ntpd: times in logs and of files mislead"))
    return sorted(found, key=lambda one: one.kind != "error")


def first_of_each(facts: list[Facts]) -> list[Facts]:
    """Of each machine the process with the lowest rank."""
    firsts: dict[int, Facts] = {}
    for one in facts:
        firsts.setdefault(one.node, one)
    return list(firsts.values())


def name_of(one: Facts) -> str:
    return f"{one.host} (machine {one.node})"


def _judge_versions(firsts: list[Facts]) -> list[Finding]:
    found = []
    for one in firsts[1:]:
        for package, version in one.versions.items():
            wanted = firsts[0].versions.get(package)
            if version == wanted:
                continue
            problem = f"{package} {version or 'absent'}, {name_of(firsts[0])} has {wanted or 'none'}"
            if package in _TO_AGREE:
                remedy = "install the same everywhere, as from one container or one environment on a shared disk"
                found.append(Finding("error", name_of(one), f"{problem}, and a run wants them equal", remedy))
            else:
                found.append(Finding("warning", name_of(one), problem, "install the same everywhere"))
    return found


def _judge_gpus(facts: list[Facts]) -> list[Finding]:
    found = []
    numbers = {one.node: sum(other.node == one.node for other in facts) for one in facts}
    for one in first_of_each(facts)[1:]:
        if numbers[one.node] != numbers[facts[0].node]:
            problem = f"{numbers[one.node]} processes, {name_of(facts[0])} has {numbers[facts[0].node]}"
            found.append(
                Finding("warning", name_of(one), problem, "start as many on each: tensor parallel groups span machines")
            )
    for one in facts[1:]:
        where = f"process {one.rank} on {name_of(one)}"
        if one.gpu != facts[0].gpu:
            problem = f"{one.gpu or 'no GPU'}, process 0 has {facts[0].gpu or 'none'}"
            kind = "warning" if one.gpu and facts[0].gpu else "error"
            found.append(Finding(kind, where, problem, "use machines that are alike: all wait for the slowest"))
        elif abs(one.gpu_bytes - facts[0].gpu_bytes) > 2**30:
            problem = f"{one.gpu_bytes / 2**30:.0f} GiB of GPU memory, process 0 has {facts[0].gpu_bytes / 2**30:.0f}"
            found.append(Finding("warning", where, problem, "plan for the least (tools/plan.py)"))
    return found


def _judge_speeds(facts: list[Facts]) -> list[Finding]:
    on_gpus = facts[0].gpu is not None
    links = {
        "within": ("its GPUs", SLOW_WITHIN, "look at `nvidia-smi topo -m` and NCCL_DEBUG=INFO (P2P, not SHM or NET)"),
        "between": (
            "its neighbours", SLOW_BETWEEN,
            "set NCCL_SOCKET_IFNAME and NCCL_IB_HCA in cluster.env; NCCL_DEBUG=INFO shows NET/IB or NET/Socket",
        ),
    }  # fmt: skip
    found = []
    for name, (others, least, remedy) in links.items():
        measured = sorted((one for one in facts if name in one.speeds), key=lambda one: -one.speeds[name])
        speeds = {one.node: one for one in measured}  # of each machine its slowest
        median = statistics.median([one.speeds[name] for one in speeds.values()] or [0.0])
        for one in speeds.values():
            speed = one.speeds[name]
            if speed == 0:
                problem = f"all-reduce with {others} does not end within {PATIENCE:.0f} s"
                found.append(Finding("error", name_of(one), problem, remedy))
            elif on_gpus and speed < least:
                problem = f"all-reduce with {others} at {speed:.1f} GB/s, below {least:.0f}"
                found.append(Finding("warning", name_of(one), problem, remedy))
            elif len(speeds) > 2 and speed < LAGS[name] * median:
                problem = f"all-reduce with {others} at {speed:.1f} GB/s, half of the machines have {median:.1f}"
                found.append(Finding("warning", name_of(one), problem, remedy))
    rates = [one.speeds["matrix"] for one in facts if "matrix" in one.speeds]
    for one in facts:
        if (rate := one.speeds.get("matrix")) is not None and rate < LAGS["matrix"] * statistics.median(rates):
            problem = f"{rate:.0f} TFLOP/s in bf16, half of the GPUs have {statistics.median(rates):.0f}"
            remedy = "look at `nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE` and at what else runs there"
            found.append(Finding("warning", f"process {one.rank} on {name_of(one)}", problem, remedy))
    return found


def describe(facts: list[Facts], findings: list[Finding], folder: str) -> str:
    """For people."""
    firsts = first_of_each(facts)
    first = firsts[0]
    kind = f"{first.gpu}, {first.gpu_bytes / 2**30:.0f} GiB" if first.gpu else f"CPU ({platform.machine()})"
    lines = [f"{len(facts)} processes on {len(firsts)} machines, {kind}"]
    lines += [f"{package:<22}{version or '-'}" for package, version in first.versions.items()]
    lines.append(f"\n{'machine':<28}{'within':>12}{'between':>12}{'matrices':>14}{'clock':>12}{'disk free':>12}")
    for one in firsts:
        rates = [other.speeds["matrix"] for other in facts if other.node == one.node and "matrix" in other.speeds]
        cells = [f"{one.speeds[name]:.2f} GB/s" if name in one.speeds else "-" for name in ("within", "between")]
        cells.append(f"{min(rates):.0f} TFLOP/s" if rates else "-")
        cells += [f"{1000 * one.clock:+.1f} ms", f"{one.disk / 2**30:.0f} GiB"]
        widths = (12, 12, 14, 12, 12)
        lines.append(
            f"{name_of(one):<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        )
    lines += ["", *map(str, findings)]
    if not any(one.folder_problem for one in firsts):
        lines.append(f"{folder} is shared by all machines")
    broken = any(finding.kind == "error" for finding in findings)
    lines.append("a run would fail" if broken else "a run can start")
    return "\n".join(lines)


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
        found = diagnose(examine(_existing(folder)))
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
        disk=shutil.disk_usage(_existing(folder)).free,
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


def _existing(folder: str) -> str:
    """The folder, or the nearest one above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return str(path)


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


def _join() -> None:
    """Meet the other processes, started by torchrun or by srun alone; without either, be the only one."""
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=environment["SLURM_NTASKS"])
        environment.setdefault("LOCAL_RANK", environment["SLURM_LOCALID"])
        environment.setdefault("MASTER_ADDR", hosts.stdout.split()[0])
        environment.setdefault("MASTER_PORT", str(10000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if have_cuda():
        torch.cuda.set_device(compute_device())
        environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = (
            "0"  # what hangs is told here, and must not end the process before
        )
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10 * PATIENCE))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code on all processes: 0 a run can start, 2 it would fail."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sstoken.preflight", description=__doc__)
    parser.add_argument("--folder", default=".", help="where checkpoints are to go: it has to be shared, and have room")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        _join()
    except RuntimeError as error:
        print(
            f"error: process {os.environ['RANK']} on {socket.gethostname()} does not meet the others over gloo "
            f"({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME to the interface that all machines reach each other by",
            file=sys.stderr,
        )
        return 2
    facts, hung = look(options.folder)
    findings = judge(facts, options.folder)
    if dist.get_rank() == 0:
        if options.json:
            print(
                json.dumps(
                    {"facts": [asdict(one) for one in facts], "findings": [asdict(one) for one in findings]}, indent=2
                )
            )
        else:
            print(describe(facts, findings, options.folder))
        sys.stdout.flush()
    code = 2 if any(finding.kind == "error" for finding in findings) else 0
    dist.barrier()
    if hung:  # NCCL would be waited for
        os._exit(code)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
