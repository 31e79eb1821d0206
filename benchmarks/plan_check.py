#!/usr/bin/env python3
"""The planner against real megatron-core models that need no GPU; see docs/planning.md.

    python benchmarks/plan_check.py

parameters: Llama-3.1-70B on 128 ranks (tensor 8 × pipeline 4 × data 4), built by `build_model` and `build_optimizer` on
torch's meta device under a fake process group: of each stage the first, a middle and the last rank.
activations, collectives: tiny models that run a whole step through megatron's schedule on the CPU, one rank of each.
published: predicted against published throughput.

Appends nothing: rewrites benchmarks/results/plan_*.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plan_reference import CASES, RESULT  # noqa: E402
from megatron_sstoken.gpus import GPUS  # noqa: E402
from megatron_sstoken.model.presets import find_architecture  # noqa: E402
from megatron_sstoken.planner.hardware import Assumptions  # noqa: E402
from megatron_sstoken.planner.memory import parameter_sizes  # noqa: E402
from megatron_sstoken.planner.search import estimate  # noqa: E402
from megatron_sstoken.planner.workload import Workload  # noqa: E402

LARGE: dict[str, Any] = {"tensor": 8, "pipeline": 4, "sequence": True, "world_size": 128, "global_batch_size": 16}
PUBLISHED: list[tuple[str, str, dict[str, Any], int, int]] = [
    # Megatron-Bridge, docs/performance-summary-archive.md (25.11 container) and its SFT table; FP8 current scaling.
    ("8b pretraining, 8 H100", "Llama-3.1-8B", {"world_size": 8, "sequence_length": 8192, "global_batch_size": 128},
     14451, 744),
    ("70b SFT, 32 H100", "Llama-3.1-70B",
     {"world_size": 32, "tensor": 4, "pipeline": 4, "virtual_pipeline": 5, "sequence": True, "sequence_length": 4096,
      "global_batch_size": 32}, 1638, 710),
    ("70b pretraining, 64 H100", "Llama-3.1-70B",
     {"world_size": 64, "tensor": 4, "pipeline": 8, "virtual_pipeline": 5, "sequence": True, "sequence_length": 8192,
      "global_batch_size": 128}, 1602, 719),
]  # fmt: skip


def run_rank(request: dict[str, Any], device: str) -> dict[str, Any]:
    """One rank of a world that does not exist, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_reference", json.dumps(request)]
    environment = os.environ | {"SSTOKEN_DEVICE": device, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{request}: {done.stderr}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line[len(RESULT) :])


def check_parameters() -> list[dict[str, Any]]:
    """Parameters, gradient buffer and optimizer state of the 70B model's ranks."""
    workload = Workload(find_architecture("Llama-3.1-70B"), **LARGE)
    per_stage = workload.world_size // workload.pipeline
    rows = []
    for stage in range(workload.pipeline):
        estimated = sum(parameter_sizes(workload, stage).values())
        for rank in (0, per_stage // 2 - 1, per_stage - 1):
            real = run_rank(
                {"kind": "build", "model": "Llama-3.1-70B", "rank": rank + stage * per_stage} | LARGE, "meta"
            )
            state = 3 * estimated / (workload.data * workload.context)
            rows.append(
                {
                    "stage": stage, "rank": rank + stage * per_stage, "estimated_parameters": estimated,
                    "built_parameters": real["parameters"], "gradient_buffer": real["gradient_buffer"],
                    "estimated_optimizer_values": round(state), "built_optimizer_values": 3 * real["optimizer_shard"],
                    "optimizer_relative_error": f"{3 * real['optimizer_shard'] / state - 1:.2e}",
                }
            )  # fmt: skip
            print(rows[-1])
    return rows


def check_steps() -> list[dict[str, Any]]:
    """Bytes kept for the backward pass, and collectives, of tiny models."""
    rows = []
    for case in CASES:
        real = run_rank({"kind": "step"} | case, "cpu")
        row = {"case": " ".join(f"{name}={value}" for name, value in case.items())}
        row |= {name: real[name] for name in ("stage", "estimated_bytes", "measured_bytes")}
        row["relative_error"] = f"{real['estimated_bytes'] / real['measured_bytes'] - 1:.4f}"
        for name in ("all_reduce", "all_gather", "reduce_scatter", "send"):
            row[f"{name}_estimated_count_bytes"] = "/".join(map(str, real["estimated"].get(name, [0, 0])))
            row[f"{name}_measured_count_bytes"] = "/".join(map(str, real["measured"].get(name, [0, 0])))
        rows.append(row)
        print(row)
    return rows


def check_published() -> list[dict[str, Any]]:
    """Throughput under two assumptions: tensor parallel communication not hidden, and hidden altogether."""
    rows = []
    for name, model, layout, tokens, tflops in PUBLISHED:
        workload = Workload(find_architecture(model), precision="fp8", selects=False, **layout)
        for exposed in (1.0, 0.0):
            found = estimate(workload, GPUS["h100"], replace(Assumptions(), tensor_exposed=exposed))
            rows.append(
                {
                    "case": name, "tensor_exposed": exposed,
                    "published_tokens": tokens, "estimated_tokens": round(found.speed.tokens_per_gpu),
                    "published_tflops": tflops, "estimated_tflops": round(found.speed.tflops_per_gpu),
                    "relative_error": f"{found.speed.tokens_per_gpu / tokens - 1:+.3f}",
                    "gflop_per_token": f"{found.speed.model_flops / found.speed.tokens / 1e9:.2f}",
                    "published_gflop_per_token": f"{tflops * 1e3 / tokens:.2f}",
                }
            )  # fmt: skip
            print(rows[-1])
    print(asdict(Assumptions()))
    return rows


def main() -> None:
    """Run all checks and write their rows."""
    checks = {"parameters": check_parameters, "steps": check_steps, "published": check_published}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="*", choices=[*checks, []], metavar="check", help="which to run; default: all")
    for name in parser.parse_args().check or checks:
        rows = checks[name]()
        with open(ROOT / "benchmarks" / "results" / f"plan_{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
