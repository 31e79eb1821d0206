"""Memory against the planner's figures, by part, of a 1B model: what stands there, and what a step adds."""

from typing import Any

import torch

from benchmarks.changes import apply
from benchmarks.gpu.results import Results
from benchmarks.gpu.runs import make_trainer, planned_memory, settings_for
from megatron_sstoken.config import Settings
from megatron_sstoken.device import synchronize
from megatron_sstoken.training.loop import training_step

GIB = 2**30
CASES: dict[str, dict[str, Any]] = {
    "selective head": {},
    "standard head": {"model__head": "standard"},
    "whole layers recomputed": {"training__recompute": "full"},
    "micro-batches of two packs": {"training__micro_batch_size": 2},
    "plain fine-tuning": {"selection__method": "full"},
    "LoRA of rank 16": {"lora__rank": 16},
    "torch's layers": {"model__backend": "torch"},
}


def run(results: Results) -> None:
    """A row a case and part. `in use` is what the device has given away, CUDA's own included."""
    for case, changes in CASES.items():
        if results.seconds_left < 10 and not results.tiny:
            results.absent(case, "no time was left")
            continue
        settings = settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, rows=4)
        with results.attempt(case):
            _measure(results, case, apply(settings, **changes))


def _measure(results: Results, case: str, settings: Settings) -> None:
    trainer = make_trainer(settings)
    training_step(trainer, 0)  # the optimizer makes its state
    synchronize()
    standing = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training_step(trainer, 1)
    synchronize()
    peak = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    planned = planned_memory(settings, trainer.plan.architecture)
    stands = planned.weights + planned.gradients + planned.optimizer
    parts = {
        "weights, gradients, optimizer": (standing, stands),
        "a step's most beside them": (peak - standing, planned.total - planned.framework - stands),
        "device in use": (total - free, planned.total),
    }
    for part, (measured, expected) in parts.items():
        results.row(
            "1B at 4,096 tokens", case=case, part=part, **{"measured GiB": measured / GIB, "planned GiB": expected / GIB},
            ratio=measured / expected,
        )  # fmt: skip
