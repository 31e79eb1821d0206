"""What this machine can run: `python -m megatron_sstoken.doctor [--json]`.

Versions, devices, what each component will run on, what is missing and the command that brings it. Exit code 0 if the
torch path can run, 2 if not. megatron-core and Transformer Engine are never imported here: a broken installation of one
raises on import. Versions are read from package metadata; imports are tried in processes of their own.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_sstoken.supported import LINES, OLDEST_TORCH, TOKEN_MULTIPLE, Line, fp8_problem, is_older, line_of

REQUIRED = (
    "torch megatron-core transformers tokenizers safetensors sentencepiece pyarrow jsonargparse docstring-parser tqdm "
    "tensorboard psutil numpy pyyaml jinja2 matplotlib xxhash".split()
)
"""What setup.py installs."""
OPTIONAL = "transformer-engine transformer-engine-torch apex flash-attn triton".split()
PACKAGES = [*REQUIRED, *OPTIONAL]
MODULES = {
    "megatron.core": ("megatron-core",),
    "transformer_engine.pytorch": ("transformer-engine", "transformer-engine-torch"),
    "amp_C": ("apex",),
    "apex.multi_tensor_apply": ("apex",),
    "fused_weight_gradient_mlp_cuda": ("apex",),
    "flash_attn": ("flash-attn",),
    "triton": ("triton",),
}
"""Module whose import is tried → packages of which one brings it; where none is installed, nothing is tried."""
INTERFACES = (
    "GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_DEBUG MASTER_ADDR "
    "MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS SSTOKEN_DEVICE NVTE_TORCH_COMPILE".split()
)
RENDEZVOUS = """
import sys, datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2,
                        timeout=datetime.timedelta(seconds=30))
value = torch.ones(1); dist.all_reduce(value); assert value.item() == 2; dist.destroy_process_group()
"""
LITTLE_SHARED_MEMORY = 1 << 30
LITTLE_DISK = 10 << 30


@dataclass(frozen=True)
class Machine:
    """What was found, before anything is concluded from it. Tests make their own."""

    versions: dict[str, str | None]
    """Package → version, None if it is not installed."""
    gpus: list[tuple[str, tuple[int, int], int]] = field(default_factory=list)
    """Name, compute capability and bytes of each GPU."""
    cuda: str | None = None
    """CUDA version of the torch build; None is a CPU build."""
    nccl: bool = False
    imports: dict[str, str] = field(default_factory=dict)
    """Module → why it does not import; '' if it does. Only installed ones are tried."""
    rendezvous: str = ""
    """Why two gloo processes did not meet; '' if they did."""
    shared_memory: int = LITTLE_SHARED_MEMORY
    disk: int = LITTLE_DISK
    environment: dict[str, str] = field(default_factory=dict)
    compiler: str | None = "cc"
    """A C compiler's path, by which Triton builds what starts its kernels."""
    headers: bool = True
    """Whether Python.h is there, which that needs."""
    python: tuple[int, int] = sys.version_info[:2]

    @property
    def line(self) -> Line:
        """The supported line of megatron-core that this machine has, or should have."""
        return line_of(self.versions.get("megatron-core"), self.python)

    def has(self, package: str) -> bool:
        return self.versions.get(package) is not None

    def works(self, module: str) -> bool:
        """Whether a module of MODULES is installed and imports."""
        assert module in MODULES, f"nobody tries to import {module}"
        return self.imports.get(module) == ""

    @property
    def runs_transformer_engine(self) -> bool:
        """Whether it imports, in a version that megatron-core takes."""
        version = self.versions.get("transformer-engine")
        fits = version is None or self.line.takes_transformer_engine(version)
        return fits and self.works("transformer_engine.pytorch")


@dataclass
class Diagnosis:
    """What follows for a run."""

    components: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """Nothing runs before these are mended."""
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Optional parts that would help on this machine, each with its command."""


def version_of(package: str) -> str | None:
    """From its metadata; does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def try_import(module: str, timeout: float = 120) -> str:
    """Why `module` does not import in a process of its own; '' if it does."""
    command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"did not import within {timeout:.0f} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def try_rendezvous(timeout: float = 90) -> str:
    """Why two processes of this machine do not meet over gloo; '' if they do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", RENDEZVOUS]
    # Within a job torch would look for the job's own store.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    processes = [
        subprocess.Popen([*command, str(rank), str(port)], stderr=subprocess.PIPE, text=True, env=alone)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1].strip().splitlines() for process in processes]
    except subprocess.TimeoutExpired:
        return f"no connection within {timeout:.0f} s"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [number for number, process in enumerate(processes) if process.returncode]
    return "" if not failed else (errors[failed[0]] or [f"exit code {processes[failed[0]].returncode}"])[-1]


def examine(folder: str | Path = ".") -> Machine:
    """Look at this machine; starts a few processes, for seconds. `folder`: where disk space is looked at."""
    versions = {package: version_of(package) for package in PACKAGES}
    gpus: list[tuple[str, tuple[int, int], int]] = []
    cuda, nccl, rendezvous = None, False, "torch is not installed"
    if versions["torch"]:
        import torch

        cuda, nccl = torch.version.cuda, torch.distributed.is_nccl_available()
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            gpus.append((properties.name, (properties.major, properties.minor), properties.total_memory))
        rendezvous = try_rendezvous()
    installed = [module for module, packages in MODULES.items() if any(versions[package] for package in packages)]
    compilers = [os.environ.get("CC", "gcc"), "clang", "cc"]  # Triton's own order
    shared = Path("/dev/shm")
    return Machine(
        versions=versions,
        gpus=gpus,
        cuda=cuda,
        nccl=nccl,
        imports={module: try_import(module) for module in installed},
        rendezvous=rendezvous,
        shared_memory=shutil.disk_usage(shared).free if shared.exists() else 0,
        disk=shutil.disk_usage(folder).free,
        environment={name: os.environ[name] for name in INTERFACES if name in os.environ},
        compiler=next((found for name in compilers if (found := shutil.which(name))), None),
        headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    )


def diagnose(machine: Machine) -> Diagnosis:
    """What runs on what, what hinders, what is missing."""
    found = Diagnosis()
    _check_packages(machine, found)
    _check_transformer_engine(machine, found)
    _check_apex(machine, found)
    if machine.rendezvous:
        found.errors.append(
            f"two gloo processes on this machine do not meet ({machine.rendezvous}): "
            "export GLOO_SOCKET_IFNAME=lo, or the network interface's name"
        )
    if machine.shared_memory < LITTLE_SHARED_MEMORY:
        found.warnings.append(
            f"/dev/shm has {machine.shared_memory / 2**30:.2f} GiB free; NCCL and workers want 1 GiB or more: "
            "start the container with --shm-size=16g"
        )
    if machine.disk < LITTLE_DISK:
        found.warnings.append(
            f"the disk has {machine.disk / 2**30:.1f} GiB free: checkpoints need 14 bytes a parameter"
        )
    if machine.environment.get("SSTOKEN_DEVICE") == "cpu" and machine.gpus:
        found.warnings.append("SSTOKEN_DEVICE=cpu hides the GPUs: unset it to use them")
    found.components = _components(machine)
    return found


def _check_packages(machine: Machine, found: Diagnosis) -> None:
    absent = [package for package in REQUIRED if not machine.has(package)]
    if absent:
        found.errors.append(f"{', '.join(absent)} not installed: pip install -c constraints.txt -e '.[dev]'")
    torch = machine.versions.get("torch")
    if torch and is_older(torch, OLDEST_TORCH):
        found.errors.append(f"torch {torch} is older than {OLDEST_TORCH}: pip install -c constraints.txt torch")
    installed = machine.versions.get("megatron-core")
    tested = [line.megatron_core for line in LINES]
    if installed and installed not in tested:
        found.warnings.append(
            f"megatron-core {installed} is not one of the tested {' and '.join(tested)}: "
            f"pip install megatron-core=={machine.line.megatron_core}"
        )
    if machine.imports.get("megatron.core"):
        found.errors.append(f"megatron.core does not import: {machine.imports['megatron.core']}")


def _check_transformer_engine(machine: Machine, found: Diagnosis) -> None:
    core = f",core_cu{machine.cuda.split('.')[0]}]" if machine.cuda else "]"
    install = (
        "pip install wheel ninja pybind11 && pip install --no-build-isolation "
        f"'{machine.line.transformer_engine.replace(']', core)}' (its part for torch is built here where NVIDIA offers none "
        "for this torch: that takes minutes, a C++ compiler, CUDA's nvcc and cuDNN's headers)"
    )
    version = machine.versions.get("transformer-engine")
    installed = machine.has("transformer-engine") or machine.has("transformer-engine-torch")
    if installed and machine.cuda is None:
        found.errors.append(
            "Transformer Engine is installed beside a CPU build of torch: it raises RuntimeError on import and "
            "megatron-core dies with it: pip uninstall transformer-engine transformer-engine-torch, or install a CUDA "
            "build of torch"
        )
    elif reason := machine.imports.get("transformer_engine.pytorch"):
        found.warnings.append(f"Transformer Engine does not import ({reason}): {install}")
    elif installed and not machine.runs_transformer_engine:
        found.warnings.append(
            f"Transformer Engine {version} is not one that megatron-core {machine.versions.get('megatron-core')} takes, and is "
            f"not used: {install}"
        )
    elif machine.gpus and not installed:
        found.missing.append(f"Transformer Engine (fused layers, FlashAttention, FP8): {install}")
    if machine.gpus and machine.runs_transformer_engine:
        _check_compiling(machine, found)


def _check_compiling(machine: Machine, found: Diagnosis) -> None:
    """What torch.compile needs, by which Transformer Engine fuses small steps when they first run."""
    lacking = {
        "Triton (pip install triton)": not machine.works("triton"),
        "a C compiler (apt-get install gcc)": machine.compiler is None,
        "Python.h (apt-get install python3-dev)": not machine.headers,
    }
    if any(lacking.values()) and machine.environment.get("NVTE_TORCH_COMPILE") != "0":
        found.warnings.append(
            "Transformer Engine fuses some steps by torch.compile, which fails in the first step without "
            f"{', '.join(name for name, is_lacking in lacking.items() if is_lacking)}: install that, or "
            "export NVTE_TORCH_COMPILE=0, which is slower"
        )


def _check_apex(machine: Machine, found: Diagnosis) -> None:
    if machine.has("apex") and not (machine.works("amp_C") and machine.works("apex.multi_tensor_apply")):
        found.warnings.append(
            f"apex {machine.versions['apex']} lacks apex.multi_tensor_apply or amp_C: PyPI's apex is another project: "
            "pip uninstall apex; NVIDIA's is at https://github.com/NVIDIA/apex and is not needed"
        )


def _components(machine: Machine) -> dict[str, str]:
    """Component → what it will run on."""
    gpu = bool(machine.gpus) and machine.environment.get("SSTOKEN_DEVICE") != "cpu"
    engine = gpu and machine.runs_transformer_engine
    apex = gpu and machine.works("amp_C") and machine.works("apex.multi_tensor_apply")
    fused = "Transformer Engine"
    where = f"{fused} in bf16 and fp8, else " if engine else ""  # model/backend.py: not in fp32
    added_inside = gpu and machine.works("fused_weight_gradient_mlp_cuda")
    return {
        "device": f"{len(machine.gpus)} × {machine.gpus[0][0]}" if gpu else f"CPU ({platform.machine()})",
        "communication": "NCCL, and gloo for messages" if gpu and machine.nccl else "gloo",
        "attention": where + "torch scaled_dot_product_attention",
        "norm": where + "torch RMSNorm, fp32 inside",
        "linear": where + "torch, sharded by megatron-core",
        "optimizer": f"{fused} fused Adam" if engine else "apex fused Adam" if apex else "torch AdamW",
        "gradient accumulation": "inside the matrix product"
        if added_inside
        else where + "separate addition (no fusion)",
        "head and loss": "vocabulary-parallel, model/head.py",
        "FP8 recipes": ", ".join(fp8_recipes(machine)) or "none" + (" (needs Transformer Engine)" if gpu else ""),
    }


def fp8_recipes(machine: Machine) -> list[str]:
    """Recipes that every GPU computes, with Transformer Engine."""
    if not machine.gpus or not machine.runs_transformer_engine:
        return []
    capabilities = {capability for _, capability, _ in machine.gpus}
    return [r for r in TOKEN_MULTIPLE if not any(fp8_problem(r, each, machine.cuda) for each in capabilities)]


def describe(machine: Machine, diagnosis: Diagnosis) -> str:
    """For people."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.release()}", ""]
    lines += [f"{package:<25}{version or '-'}" for package, version in machine.versions.items()]
    lines += [f"{'CUDA of torch':<25}{machine.cuda or '- (CPU build)'}", ""]
    lines += [
        f"GPU {number}: {name}, compute capability {major}.{minor}, {size / 2**30:.0f} GiB"
        for number, (name, (major, minor), size) in enumerate(machine.gpus)
    ]
    lines += [f"{name:<25}{value}" for name, value in diagnosis.components.items()]
    lines += ["", f"{'two gloo processes':<25}{machine.rendezvous or 'meet'}"]
    lines += [f"{'free':<25}disk {machine.disk / 2**30:.1f} GiB, /dev/shm {machine.shared_memory / 2**30:.1f} GiB"]
    lines += [f"{name:<25}{value}" for name, value in machine.environment.items()]
    for kind in ("missing", "warnings", "errors"):
        lines += [f"{kind.removesuffix('s')}: {text}" for text in getattr(diagnosis, kind)]
    lines += ["", "the torch path cannot run" if diagnosis.errors else "the torch path can run"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None, look: Callable[[], Machine] = examine) -> int:
    """Entry point; returns the exit code: 0 the torch path can run, 2 it cannot."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sstoken.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    machine = look()
    diagnosis = diagnose(machine)
    if options.json:
        result: dict[str, Any] = asdict(machine) | asdict(diagnosis) | {"torch_path": not diagnosis.errors}
        print(json.dumps(result, indent=2))
    else:
        print(describe(machine, diagnosis))
    return 2 if diagnosis.errors else 0


if __name__ == "__main__":
    sys.exit(main())
