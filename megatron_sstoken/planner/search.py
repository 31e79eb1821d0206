"""Estimates: one layout judged, and the best of all layouts."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_sstoken.config import ParallelSettings
from megatron_sstoken.gpus import GPU
from megatron_sstoken.planner.communication import Traffic, traffic_of
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import StageMemory, memory_of
from megatron_sstoken.planner.step_time import Speed, speed_of
from megatron_sstoken.planner.workload import Recompute, Workload, problems_of_workload
from megatron_sstoken.supported import fp8_problem
from megatron_sstoken.validate.findings import divisors_of

NEW_CUDA = "13.0"


@dataclass(frozen=True)
class Estimate:
    """What a workload needs and gives on a GPU type."""

    workload: Workload
    gpu: GPU
    assumptions: Assumptions
    memory: list[StageMemory]
    traffic: list[list[Traffic]]
    """By stage."""
    speed: Speed

    @property
    def peak(self) -> StageMemory:
        """The fullest stage."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def excess(self) -> float:
        """Bytes by which the fullest stage exceeds the GPU's memory; negative if it fits."""
        return self.peak.total - self.gpu.memory

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; bytes, seconds and counts."""
        workload = {name: value for name, value in asdict(self.workload).items() if name != "architecture"}
        derived = {name: getattr(self.speed, name) for name in ("step", "tokens_per_gpu", "tflops_per_gpu")}
        return {
            "architecture": asdict(self.workload.architecture),
            "workload": workload | {"data": self.workload.data, "num_micro_batches": self.workload.num_micro_batches},
            "gpu": asdict(self.gpu),
            "assumptions": asdict(self.assumptions),
            "fits": self.excess <= 0,
            "excess_bytes": self.excess,
            "memory": [asdict(stage) | {"total": stage.total} for stage in self.memory],
            "traffic": [[asdict(one) | {"sent": one.sent} for one in stage] for stage in self.traffic],
            "speed": asdict(self.speed) | derived,
        }


def estimate(w: Workload, gpu: GPU, assumptions: Assumptions) -> Estimate:
    """Work one out. The workload must be free of problems (`problems_of_workload`)."""
    traffic = [traffic_of(w, stage, gpu) for stage in range(w.pipeline)]
    return Estimate(w, gpu, assumptions, memory_of(w, assumptions), traffic, speed_of(w, gpu, assumptions))


def precision_problems(w: Workload, gpu: GPU) -> list[str]:
    """FP8 needs the hardware and Transformer Engine; CUDA is taken to be new enough."""
    if w.precision != "fp8":
        return []
    found = []
    if gpu.fp8 == 0:
        found.append(f"precision=fp8: {gpu.name} has no FP8 units: use precision=bf16, or another GPU")
    elif problem := fp8_problem(w.fp8_recipe, gpu.capability, NEW_CUDA):
        found.append(f"fp8_recipe={w.fp8_recipe}: {gpu.name} has {problem}")
    return found


def propose(w: Workload, gpu: GPU, assumptions: Assumptions, number: int = 5) -> list[Estimate]:
    """The fastest layouts of `world_size` GPUs that fit, best first; batch, precision and head stay as they are.

    Tensor parallel stays within a node and comes with sequence parallel. Layouts of equal speed: less memory first.
    """
    runnable = (candidate for candidate in _candidates(w, gpu) if not problems_of_workload(candidate))
    fitting = (
        candidate
        for candidate in runnable
        if all(stage.total <= gpu.memory for stage in memory_of(candidate, assumptions))
    )
    found = [estimate(candidate, gpu, assumptions) for candidate in fitting]
    best: dict[tuple, Estimate] = {}  # of layouts that differ in recomputation or the stages' layers alone, the fastest
    for one in sorted(found, key=lambda one: (one.speed.step, one.peak.total)):
        c = one.workload
        best.setdefault((c.tensor, c.pipeline, c.virtual_pipeline, c.context, c.micro_batch_size), one)
    return list(best.values())[:number]


def smallest_excess(w: Workload, gpu: GPU, assumptions: Assumptions) -> Estimate | None:
    """Of all layouts that can run, the one that lacks least memory; None if none can run at all."""
    found = [estimate(c, gpu, assumptions) for c in _candidates(w, gpu) if not problems_of_workload(c)]
    return min(found, key=lambda one: one.excess, default=None)


def _candidates(w: Workload, gpu: GPU) -> Iterator[Workload]:
    a = w.architecture
    recomputed: tuple[Recompute, ...] = ("none", "full") if a.delta_net is None else ("none", "selective", "full")
    for tensor in divisors_of(math.gcd(a.num_attention_heads, w.world_size), gpu.gpus_per_node):
        for pipeline in divisors_of(w.world_size // tensor, a.num_layers):
            for context in divisors_of(w.world_size // (tensor * pipeline), 8):
                for virtual in divisors_of(a.num_layers // pipeline, 10) if pipeline > 1 else [1]:
                    for first, last in _stages(a.num_layers, pipeline, virtual):
                        for micro in (1, 2, 4, 8):
                            for recompute in recomputed:
                                yield replace(
                                    w, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context,
                                    first_stage_layers=first, last_stage_layers=last, sequence=tensor > 1,
                                    micro_batch_size=micro, recompute=recompute,
                                )  # fmt: skip


def _stages(layers: int, pipeline: int, chunks: int) -> Iterator[tuple[int | None, int | None]]:
    """Layers of the first and last stage: as many as the others, and fewer by as little as can be."""
    if layers % (pipeline * chunks) == 0:
        yield None, None
    if ends := ParallelSettings(pipeline=pipeline, virtual_pipeline=chunks).uneven_ends(layers):
        yield ends
