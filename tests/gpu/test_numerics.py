"""On a GPU with Transformer Engine: each kind of numerics against a plainer one, through `megatron_sstoken.score` on both.

    python -m pytest tests/gpu

Without a GPU the comparisons of the GPU are skipped, and the same program compares what a CPU has.
"""

import csv
import importlib.util
import subprocess
import sys

import pytest
import torch
import yaml

from tests.helpers import cli
from tests.helpers.workbench import make_model, make_samples, make_store

ROOT = cli.ROOT
TE, FP8 = "transformer_engine", "training.precision=fp8"
ON_GPU = {
    "torch fp32, torch bf16": (["training.precision=fp32"], ["training.precision=bf16", "model.backend=torch"]),
    "torch fp32, transformer engine": (
        ["training.precision=fp32"],
        [f"model.backend={TE}", "training.precision=bf16"],
    ),
    "padded, packed": (["data.packing=false"], ["data.packing=true"]),
    "bf16, fp8 tensorwise": ([], [FP8]),
    "bf16, fp8 blockwise": ([], [FP8, "training.fp8_recipe=blockwise"]),
    "bf16, fp8 delayed": ([], [FP8, "training.fp8_recipe=delayed"]),
}
ON_CPU = {
    "torch fp32, torch bf16": (["training.precision=fp32"], ["training.precision=bf16"]),
    "padded, packed": (["training.precision=fp32", "data.packing=false"], ["data.packing=true"]),
}
# Overlap at least; mean |loss difference| and attention difference at most. fp32 does not care for packing.
BOUNDS = {"fp8": (0.9, 0.1, 0.1), "bf16": (0.95, 0.05, 0.03), "fp32": (0.999, 1e-4, 1e-4)}


def why_no_gpu() -> str:
    """Why GPU comparisons cannot run here, or an empty string."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed: python -m megatron_sstoken.doctor names the command"
    return ""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of a small random model whose sizes FP8's tiles divide; head_dim 64 as Llama-3.2-1B's."""
    folder = tmp_path_factory.mktemp("numerics")
    model = make_model(
        folder / "model", hidden_size=256, intermediate_size=512, num_attention_heads=4, initializer_range=0.05
    )
    history = make_model(
        folder / "history",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        initializer_range=0.05,
        seed=1,
    )
    settings = {
        "model": {"hf_path": model},
        "history": {"hf_path": history},
        "data": {"train": make_store(folder / "data", make_samples(24, longest=120)), "sequence_length": 128},
        "training": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def shift(config, tmp_path, first: list[str], other: list[str], device: str) -> dict[str, float]:
    """What benchmarks/numerics_shift.py finds between two settings, by column."""
    command = [
        sys.executable,
        "benchmarks/numerics_shift.py",
        "--work",
        str(tmp_path),
        "--csv",
        str(tmp_path / "rows.csv"),
    ]
    command += [part for change in other for part in ("--other", change)]
    command += ["--config", str(config), *(f"--{change}" for change in first)]
    environment = cli.environment() | {"SSTOKEN_DEVICE": device}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {name: value if name in ("first", "other") else float(value) for name, value in row.items()}


def assert_within_bounds(found: dict) -> None:
    """Differences are as large as the coarser numerics makes them, and no larger."""
    coarser = next(name for name in BOUNDS if name in found["other"] or name in found["first"])
    overlap, loss, attention = BOUNDS[coarser]
    assert found["overlap"] >= overlap, found
    assert found["loss_mean"] <= loss and abs(found["mean_loss_difference"]) <= loss, found
    assert found["attention_max"] <= attention, found


@pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu() or "there is one")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("pair", ON_GPU)
def test_arithmetics_of_a_gpu(config, tmp_path, pair):
    found = shift(config, tmp_path, *ON_GPU[pair], device="")
    print(found)
    assert_within_bounds(found)


@pytest.mark.parametrize("pair", [pytest.param(pair, marks=pytest.mark.slow) for pair in ON_CPU])
def test_arithmetics_of_a_cpu(config, tmp_path, pair):
    found = shift(config, tmp_path, *ON_CPU[pair], device="cpu")
    assert ("bf16" in found["other"]) == (found["loss_mean"] > 1e-4), "two arithmetics, and not one twice"
    assert_within_bounds(found)
