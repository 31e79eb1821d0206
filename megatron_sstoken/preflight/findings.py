"""What the facts about the machines of a job mean for a run."""

import platform
import statistics
from dataclasses import dataclass, field

PATIENCE = 120.0
"""Seconds after which a measurement counts as hanging."""
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
