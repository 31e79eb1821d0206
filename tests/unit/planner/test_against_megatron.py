"""The planner's counts against real megatron-core models: one rank each of worlds that do not exist."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.plan_reference import CASES, RESULT, tiny_workload
from megatron_sstoken.model.presets import find_architecture
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import parameter_sizes, stage_memory
from megatron_sstoken.planner.workload import Workload
from tests.helpers.cli import ROOT

LARGE = {"world_size": 128, "tensor": 8, "pipeline": 4, "sequence": True, "global_batch_size": 16}
TINY = [
    {"family": family, "tied": tied, "rank": rank, "global_batch_size": 4, "world_size": 8} | layout
    for family, tied in (("llama", False), ("qwen2", True))
    for layout in (
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
        {"tensor": 2, "context": 2, "precision": "fp32"},
        {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1, "layers": 6, "gradient_dtype": "bf16"},
    )
    for rank in (0, 7)
]
DELTA = {"family": "qwen3_5_text", "global_batch_size": 4, "world_size": 4, "tensor": 2, "pipeline": 2}
TINY += [DELTA | {"rank": 0}, DELTA | {"rank": 3}]

pytestmark = pytest.mark.timeout(300)  # a process that imports megatron-core, on a machine that may be busy


def answers(requests: list[dict], device: str) -> list[dict]:
    """Of `benchmarks.plan_reference`, in order."""
    command = [sys.executable, "-m", "benchmarks.plan_reference", *map(json.dumps, requests)]
    environment = os.environ | {"SSTOKEN_DEVICE": device, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[len(RESULT) :]) for line in done.stdout.splitlines() if line.startswith(RESULT)]


def test_parameters_gradients_and_optimizer_state_of_tiny_models_and_of_70b_on_128_ranks():
    ranks = [{"model": "Llama-3.1-70B", "rank": rank} | LARGE for rank in (0, 79, 127)]
    built = answers([{"kind": "build"} | request for request in TINY + ranks], "meta")
    large = Workload(find_architecture("Llama-3.1-70B"), **LARGE)
    for request, real in zip(TINY + ranks, built, strict=True):
        w = large if "model" in request else tiny_workload(request)[0]
        estimated = stage_memory(w, real["stage"], Assumptions())
        assert estimated.parameters == estimated.trainable == sum(parameter_sizes(w, real["stage"]).values())
        assert estimated.parameters == real["parameters"], request
        padding = 0.0 if "model" in request else 0.02  # buckets are padded to 128 values, which tiny models notice
        assert estimated.gradients == pytest.approx(real["gradient_bytes"], rel=padding), request
        state = estimated.optimizer // (8 if w.precision == "fp32" else 12)
        assert state == pytest.approx(real["optimizer_shard"], rel=max(padding, 1e-9) * 2), request


def test_what_is_kept_for_backward_and_what_is_communicated():
    measured = answers([{"kind": "step"} | case for case in CASES], "cpu")
    for case, real in zip(CASES, measured, strict=True):
        assert real["left_bytes"] == 0
        assert real["estimated_bytes"] == pytest.approx(real["measured_bytes"], rel=0.02), case
        for operation in ("all_gather", "reduce_scatter", "send"):
            assert real["measured"].get(operation, [0, 0]) == real["estimated"].get(operation, [0, 0]), (
                case,
                operation,
            )
        if case.get("tensor", 1) > 1:  # groups of one are called too, but nothing moves; and the token count, one int
            estimated = real["estimated"].get("all_reduce", [0, 0])
            count, size = real["measured"]["all_reduce"]
            # First tokens have no loss: the head leaves them out, the estimate does not.
            assert estimated[0] <= count <= estimated[0] + 2 and estimated[1] <= 1.01 * size, case
