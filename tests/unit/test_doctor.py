"""The doctor's conclusions on machines that tests make up, and one look at this one."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_sstoken.doctor import LITTLE_DISK, PACKAGES, Machine, diagnose, fp8_recipes, main, try_import
from tests.helpers.cli import ROOT, environment

INSTALLED = dict.fromkeys(PACKAGES, "1.0") | {"megatron-core": "0.16.1"}
ABSENT = dict.fromkeys(("transformer-engine", "transformer-engine-torch", "apex", "flash-attn"))
CPU = Machine(versions=INSTALLED | ABSENT, imports={"megatron.core": ""})
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
ENGINE = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0"}
HOPPER = replace(
    CPU, gpus=[H100], cuda="13.0", nccl=True, versions=CPU.versions | ENGINE,
    imports={"megatron.core": "", "transformer_engine.pytorch": ""},
)  # fmt: skip


def test_a_sound_machine_without_gpu_runs_the_torch_path():
    found = diagnose(CPU)
    assert (found.errors, found.warnings, found.missing) == ([], [], [])
    assert found.components["communication"] == "gloo" and found.components["FP8 recipes"] == "none"
    assert found.components["optimizer"] == "torch AdamW"


def test_a_gpu_without_transformer_engine_is_told_the_command():
    machine = replace(HOPPER, versions=CPU.versions, imports=CPU.imports)
    found = diagnose(machine)
    assert not found.errors and "transformer-engine[pytorch]>=2.9,<2.12" in found.missing[0]
    assert found.components["communication"].startswith("NCCL")


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
        ({"rendezvous": "Connection refused"}, "errors", "GLOO_SOCKET_IFNAME"),
        ({"versions": CPU.versions | {"megatron-core": "0.17.0"}}, "warnings", "megatron-core==0.16.1"),
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
    assert result["torch_path"] and result["versions"]["megatron-core"] == "0.16.1" and result["rendezvous"] == ""
