"""What real megatron-core models hold, keep and communicate: the planner's reference.

    python -m benchmarks.plan_reference '{"kind": "step", …}' …

Each request is answered by a forked process, for a process can be one rank once, with a line `RESULT {…}`.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

from benchmarks.fake_world import CountCollectives, fake_model, make_batch, measure_saved
from megatron_sstoken.gpus import GPUS
from megatron_sstoken.model.families import Architecture, DeltaNet
from megatron_sstoken.model.optimizer import build_optimizer
from megatron_sstoken.model.presets import MODELS, find_architecture
from megatron_sstoken.passes.step import select_and_train
from megatron_sstoken.planner.communication import traffic_of
from megatron_sstoken.planner.memory import activation_bytes, head_kept_bytes, layer_activations
from megatron_sstoken.planner.workload import Workload
from megatron_sstoken.selection.methods import Selection

RESULT = "RESULT "
SEQUENCE = 128
CASES: list[dict[str, Any]] = [
    {"global_batch_size": 1},
    {"global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32"},
    {"global_batch_size": 1, "groups": 8},
    {"global_batch_size": 1, "recompute": "selective"},
    {"global_batch_size": 1, "recompute": "full", "world_size": 2, "tensor": 2},
    {"global_batch_size": 1, "world_size": 2, "tensor": 2, "sequence": True},
    {"global_batch_size": 1, "world_size": 2, "tensor": 2, "precision": "fp32"},
    {"global_batch_size": 1, "world_size": 2, "context": 2},
    {"global_batch_size": 8, "world_size": 4, "pipeline": 4, "rank": 1},
    {"global_batch_size": 4, "world_size": 2, "pipeline": 2, "virtual_pipeline": 2, "rank": 1},
    {"global_batch_size": 4, "world_size": 2, "pipeline": 2, "first_stage_layers": 1, "rank": 0},
    {"global_batch_size": 4, "world_size": 2, "pipeline": 2, "first_stage_layers": 1, "rank": 1},
    {"global_batch_size": 4, "world_size": 4, "tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
    {"family": "qwen3_5_text", "global_batch_size": 1},
    {"family": "qwen3_5_text", "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32"},
    {"family": "qwen3_5_text", "global_batch_size": 1, "recompute": "selective"},
    {"family": "qwen3_5_text", "global_batch_size": 1, "recompute": "full", "world_size": 2, "tensor": 2},
    {"family": "qwen3_5_text", "global_batch_size": 1, "world_size": 2, "tensor": 2, "sequence": True},
    {"family": "qwen3_5_text", "global_batch_size": 1, "world_size": 2, "context": 2},
    {"family": "qwen3_5_text", "global_batch_size": 1, "world_size": 2, "context": 2, "recompute": "selective"},
    {"family": "qwen3_5_text", "global_batch_size": 4, "world_size": 2, "pipeline": 2, "rank": 1},
]
"""Layouts of a Llama of 4 layers, or of Qwen3.5 with attention in the last; `rank` is the one that is measured."""


def tiny_workload(case: dict[str, Any]) -> tuple[Workload, int]:
    """The workload of a case, and the rank; `family: qwen2` has biases, `qwen3_5_text` delta nets but in every fourth layer;
    `tied: True` ties the embeddings, `layers` are 4."""
    case = dict(case)
    rank, groups = case.pop("rank", 0), case.pop("groups", 4)
    family, tied, layers = case.pop("family", "llama"), case.pop("tied", False), case.pop("layers", 4)
    architecture = Architecture(
        family,
        64,
        layers,
        8,
        groups,
        8,
        160,
        99,
        512,
        1e-5,
        10000.0,
        None,
        tied_embeddings=tied,
        qkv_bias=family == "qwen2",
    )
    if family == "qwen3_5_text":
        architecture = replace(
            architecture,
            rotary_fraction=0.25,
            qk_norm=True,
            zero_centered_norms=True,
            output_gate=True,
            delta_net=DeltaNet(key_heads=4, value_heads=8, key_dim=12, value_dim=20, kernel=4),
            delta_layers=tuple((layer + 1) % 4 > 0 for layer in range(layers)),
        )
    return Workload(architecture, backend="torch", sequence_length=SEQUENCE, selects=False, **case), rank


def run_step(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes kept and collectives of one plain training step, estimated and measured, on the CPU."""
    w, rank = tiny_workload(case)
    model = fake_model(w.architecture, w.settings(), rank, w.world_size)
    stage = model.layout.pipeline_rank
    batches = [make_batch(SEQUENCE, w.micro_batch_size) for _ in range(w.num_micro_batches)]
    with measure_saved(model) as kept, CountCollectives() as collectives:
        select_and_train(
            model, batches, lambda report: Selection(report.batch.response, report.loss, report.loss, report.loss)
        )
    estimated: dict[str, list[int]] = {}
    for traffic in traffic_of(w, stage, GPUS["h100"]):
        if traffic.kind != "data":  # outside of select_and_train, or in calls of another name
            count, size = estimated.get(traffic.operation, [0, 0])
            estimated[traffic.operation] = [count + traffic.count, size + traffic.size]
    total = activation_bytes(w, stage)
    if stage == w.pipeline - 1:
        total += head_kept_bytes(w)
    if w.recompute == "full":
        # The peak is in a layer's backward, when the loss and the layers behind it have been freed.
        inputs = w.split_tokens * w.architecture.hidden_size * w.width
        total = max(
            (number + 1) * inputs
            + sum(layer_activations(w, delta=layer not in w.architecture.attention_layers).values())
            for chunk in w.settings().parallel.chunk_layers(w.architecture.num_layers)[stage]
            for number, layer in enumerate(chunk)
        )
    return {
        "stage": stage,
        "estimated_bytes": total,
        "measured_bytes": kept.peak,
        "left_bytes": kept.now,
        "estimated": estimated,
        "measured": collectives.counts,
    }


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parameters, gradient buffer and the optimizer's shard of one rank, in values; on the meta device."""
    name = request.pop("model", None)
    if name in MODELS:
        rank = request.pop("rank")
        w = Workload(find_architecture(name), **request)
    else:
        w, rank = tiny_workload(request)
    settings = w.settings()
    model = fake_model(w.architecture, settings, rank, w.world_size)
    optimizer, _ = build_optimizer(model, settings.optimizer, num_steps=10)
    shards = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        groups = [*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups]
        shards += sum(parameter.numel() for group in groups for parameter in group)
    # A DistributedDataParallel's own list, under the name of a method of torch's.
    buffers = [buffer for chunk in model.chunks for buffer in chunk.buffers]  # type: ignore[attr-defined]  # see above
    return {
        "stage": model.layout.pipeline_rank,
        "parameters": sum(parameter.numel() for chunk in model.unwrapped for parameter in chunk.parameters()),
        "gradient_buffer": sum(buffer.grad_data.numel() for buffer in buffers),
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer_shard": shards,
    }


def answer(request: dict[str, Any]) -> None:
    """Print the result of one request."""
    kind = request.pop("kind")
    print(RESULT + json.dumps(run_step(request) if kind == "step" else build(request)), flush=True)


def main() -> int:
    """Answer all requests, each in a process of its own."""
    for text in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            try:
                answer(json.loads(text))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
