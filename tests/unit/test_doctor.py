"""The doctor's conclusions on machines that tests make up, and one look at this one."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_sstoken import doctor
from megatron_sstoken.doctor import (
    LITTLE_DISK,
    MODULES,
    PACKAGES,
    Machine,
    diagnose,
    examine,
    fp8_recipes,
    main,
    try_import,
)
from megatron_sstoken.supported import LINES
from tests.helpers.cli import ROOT, environment

TESTED = [line.megatron_core for line in LINES]
INSTALLED = dict.fromkeys(PACKAGES, "3.0") | {"megatron-core": "0.16.1"}
ABSENT = dict.fromkeys(("transformer-engine", "transformer-engine-torch", "apex", "flash-attn"))
CPU = Machine(versions=INSTALLED | ABSENT, imports={"megatron.core": ""})
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
ENGINE = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0"}
HOPPER = replace(
    CPU, gpus=[H100], cuda="13.0", nccl=True, versions=CPU.versions | ENGINE,
    imports={"megatron.core": "", "transformer_engine.pytorch": "", "triton": ""},
)  # fmt: skip


def test_a_sound_machine_without_gpu_runs_the_torch_path():
    found = diagnose(CPU)
    assert (found.errors, found.warnings, found.missing) == ([], [], [])
    assert found.components["communication"] == "gloo" and found.components["FP8 recipes"] == "none"
    assert found.components["optimizer"] == "torch AdamW"


def test_a_gpu_without_transformer_engine_is_told_the_command():
    machine = replace(HOPPER, versions=CPU.versions, imports=CPU.imports)
    found = diagnose(machine)
    wanted = "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.10,<2.12'"
    assert not found.errors and wanted in found.missing[0] and "wheel ninja pybind11" in found.missing[0]
    assert found.components["communication"].startswith("NCCL")


@pytest.mark.parametrize(
    ("apex", "told"),
    [
        ({}, "Transformer Engine in bf16 and fp8, else separate addition (no fusion)"),
        (dict.fromkeys(["fused_weight_gradient_mlp_cuda"], ""), "inside the matrix product"),
    ],
)
def test_fused_weight_gradients_are_told_where_they_are(apex, told):
    versions = HOPPER.versions | {"apex": "0.1"}
    found = diagnose(replace(HOPPER, versions=versions, imports=HOPPER.imports | apex))
    assert found.components["gradient accumulation"] == told


def test_whatever_is_asked_for_has_been_tried(monkeypatch):
    """A module that nobody tries to import would count as missing on every machine."""
    tried = []
    monkeypatch.setattr(doctor, "version_of", lambda package: "3.0")
    monkeypatch.setattr(doctor, "try_import", lambda module: tried.append(module) or "")
    monkeypatch.setattr(doctor, "try_rendezvous", lambda: "")
    machine = examine()
    assert set(tried) == set(MODULES)
    everything = diagnose(replace(machine, gpus=[H100], cuda="13.0", environment={}))
    assert everything.components["gradient accumulation"] == "inside the matrix product"
    with pytest.raises(AssertionError, match="nobody tries to import nowhere"):
        machine.works("nowhere")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"imports": HOPPER.imports | {"triton": "ImportError"}}, "without Triton (pip install triton): install"),
        (
            {"compiler": None, "headers": False},
            "without a C compiler (apt-get install gcc), Python.h (apt-get install python3-dev)",
        ),
    ],
)
def test_what_transformer_engine_compiles_with_is_looked_for(changes, named):
    machine = replace(HOPPER, **changes)
    (warning,) = diagnose(machine).warnings
    assert named in warning and "export NVTE_TORCH_COMPILE=0" in warning
    assert diagnose(replace(machine, environment={"NVTE_TORCH_COMPILE": "0"})).warnings == []
    assert diagnose(replace(machine, gpus=[])).warnings == []


@pytest.mark.parametrize(
    ("capability", "cuda", "recipes"),
    [
        ((9, 0), "13.0", ["delayed", "tensorwise", "blockwise"]),
        ((9, 0), "12.8", ["delayed", "tensorwise"]),
        ((10, 0), "13.0", ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        ((8, 0), "13.0", []),
    ],
)
def test_fp8_recipes(capability, cuda, recipes):
    assert fp8_recipes(replace(HOPPER, gpus=[("GPU", capability, 1)], cuda=cuda)) == recipes


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"versions": CPU.versions | ENGINE}, "errors", "beside a CPU build of torch"),
        ({"versions": CPU.versions | {"pyarrow": None}}, "errors", "pyarrow not installed: pip install"),
        ({"imports": {"megatron.core": "RuntimeError: broken"}}, "errors", "RuntimeError: broken"),
        (
            {"versions": CPU.versions | {"torch": "2.7.1+cu128"}},
            "errors",
            "torch 2.7.1+cu128 is older than 2.8: pip install",
        ),
        ({"rendezvous": "Connection refused"}, "errors", "GLOO_SOCKET_IFNAME"),
        (
            {"versions": CPU.versions | {"megatron-core": "0.17.0"}, "python": (3, 11)},
            "warnings",
            "megatron-core==0.16.1",
        ),
        (
            {"versions": CPU.versions | {"megatron-core": "0.20.0"}, "python": (3, 13)},
            "warnings",
            "megatron-core==0.19.2",
        ),
        (
            {"versions": CPU.versions | {"apex": "0.9.10dev"}, "imports": CPU.imports | {"amp_C": "No module"}},
            "warnings",
            "another project: pip uninstall apex",
        ),
        ({"shared_memory": 1 << 26}, "warnings", "--shm-size"),
        ({"disk": LITTLE_DISK - 1}, "warnings", "the disk has"),
    ],
)
def test_what_hinders_is_named_with_its_remedy(changes, kind, message):
    machine = replace(CPU, **changes)
    found = diagnose(machine)
    assert any(message in text for text in getattr(found, kind)), found
    assert main([], look=lambda: machine) == (2 if kind == "errors" else 0)


@pytest.mark.parametrize(
    ("core", "engine", "wanted"),
    [
        ("0.16.1", "2.12.0", ">=2.10,<2.12"),
        ("0.19.2", "2.21.1+abc", ">=2.10,<2.21"),
        ("0.19.2", "2.9.0", ">=2.10,<2.21"),
    ],
)
def test_a_transformer_engine_that_megatron_does_not_take(core, engine, wanted):
    versions = HOPPER.versions | {"megatron-core": core, "transformer-engine": engine}
    machine = replace(HOPPER, versions=versions)
    found = diagnose(machine)
    (warning,) = found.warnings
    assert f"Transformer Engine {engine} is not one that megatron-core {core} takes" in warning and wanted in warning
    assert fp8_recipes(machine) == [] and found.components["linear"].startswith("torch")


def test_newer_megatron_takes_newer_transformer_engine():
    versions = HOPPER.versions | {"megatron-core": "0.19.2", "transformer-engine": "2.20.2"}
    machine = replace(HOPPER, versions=versions)
    assert diagnose(machine).warnings == [] and fp8_recipes(machine) == ["delayed", "tensorwise", "blockwise"]


def test_hidden_gpus_are_told():
    found = diagnose(replace(HOPPER, environment={"SSTOKEN_DEVICE": "cpu"}))
    assert "hides the GPUs" in found.warnings[0] and found.components["device"].startswith("CPU")


def test_a_module_that_fails_does_so_in_its_own_process():
    assert "No module named 'nowhere_to_be_found'" in try_import("nowhere_to_be_found")
    assert try_import("json") == ""


@pytest.mark.timeout(300)  # five processes that import torch, on a machine that may be busy
def test_this_machine():
    command = [sys.executable, "-m", "megatron_sstoken.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["torch_path"] and result["versions"]["megatron-core"] in TESTED and result["rendezvous"] == ""
