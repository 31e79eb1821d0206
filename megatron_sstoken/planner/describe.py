"""Estimates for people, in 120 columns."""

import textwrap
from dataclasses import asdict, fields

from megatron_sstoken.checkpoint.size import describe_checkpoint
from megatron_sstoken.planner.hardware import GIB, Assumptions
from megatron_sstoken.planner.memory import BYTE_FIELDS
from megatron_sstoken.planner.search import Estimate
from megatron_sstoken.planner.workload import Workload


def describe_estimate(estimate: Estimate) -> str:
    """Layout, memory by stage, traffic of the fullest stage, step time, checkpoint, assumptions, verdict."""
    parts = [
        _head(estimate),
        _memory(estimate),
        _traffic(estimate),
        _speed(estimate),
        _checkpoint(estimate),
        describe_assumptions(estimate),
        verdict(estimate),
    ]
    return "\n\n".join(parts)


def verdict(estimate: Estimate) -> str:
    """Whether it fits, and by how much."""
    peak, limit = estimate.peak.total / GIB, estimate.gpu.memory / GIB
    text = f"stage {estimate.peak.stage} needs {peak:.1f} GiB of the {limit:.1f} GiB of a {estimate.gpu.name}"
    if estimate.excess <= 0:
        return f"fits: {text}, {-estimate.excess / GIB:.1f} GiB to spare"
    return f"does not fit: {text}, {estimate.excess / GIB:.1f} GiB too much\n(--propose lists layouts that fit)"


def describe_gain(estimate: Estimate, best: Estimate | None) -> str:
    """What the fastest layout that fits would give, beside an estimate; None where none fits."""
    if best is None:
        return "proposed: nothing, no layout of these GPUs fits"
    gain = best.speed.tokens_per_gpu / estimate.speed.tokens_per_gpu - 1
    w = best.workload
    if estimate.excess <= 0 and gain < 0.02:
        return "proposed: this layout; no other is faster by 2 % or more"
    return (
        f"proposed: {describe_layout(w)}, micro-batch {w.micro_batch_size}, recompute {w.recompute}: "
        f"{best.speed.tokens_per_gpu:,.0f} tokens/s/GPU ({gain:+.0%}), {best.peak.total / GIB:.1f} GiB\n"
        "(--yaml prints it as a configuration)"
    )


def describe_layout(w: Workload) -> str:
    """'tensor 4 (sequence) × pipeline 4 (× 5 chunks) × context 1 × data 2'."""
    return (
        f"tensor {w.tensor}{' (sequence)' if w.sequence else ''} × pipeline {w.pipeline}"
        + (f" (× {w.virtual_pipeline} chunks)" if w.virtual_pipeline > 1 else "")
        + (f" of {'+'.join(map(str, w.stage_layers))} layers" if len(set(w.stage_layers)) > 1 else "")
        + f" × context {w.context} × data {w.data}"
    )


def _head(estimate: Estimate) -> str:
    w, a = estimate.workload, estimate.workload.architecture
    trained = f"LoRA rank {w.lora_rank}" if w.lora_rank else "all parameters trained"
    precision = f"fp8 {w.fp8_recipe}" if w.precision == "fp8" else w.precision
    saved = [f"gradients {w.gradient_dtype}"] if w.gradient_dtype != "fp32" else []
    if w.moment_widths != (4, 4):
        saved.append(f"moments {w.first_moment_dtype} and {w.second_moment_dtype}")
    if w.offload_fraction:
        saved.append(f"{w.offload_fraction:.0%} of the optimizer's state in the host's memory")
    if w.copies_weights:
        saved.append(f"a copy of the weights for history.source={w.history}")
    if w.offload_layers:
        saved.append(f"activations of {w.offload_layers} layers in the host's memory")
    share = f", {w.response:.0%} response, {w.rho:.0%} of it trained" if w.selects else ""
    rows = [
        ("model", f"{a.family}, {a.num_parameters():,} parameters, {a.num_layers} layers; {trained}"),
        ("GPUs", f"{w.world_size} × {estimate.gpu.name} = {describe_layout(w)}"),
        (
            "batch",
            f"{w.global_batch_size} packs of {w.sequence_length} = micro-batch {w.micro_batch_size} × data {w.data} × "
            f"accumulation {w.num_micro_batches}",
        ),
        ("computed", f"{precision}, {w.layers_of}, recompute {w.recompute}, {w.head} head{share}"),
    ]
    if saved:
        rows.append(("memory", ", ".join(saved)))
    return "\n".join(f"{name:<10}{value}" for name, value in rows)


def _memory(estimate: Estimate) -> str:
    names = [*BYTE_FIELDS, "total"]
    rows = [f"{'stage':>5}{'parameters':>15}" + "".join(f"{name:>{_width(name)}}" for name in names)]
    for stage in estimate.memory:
        values = [getattr(stage, name) / GIB for name in names]
        cells = "".join(f"{value:>{_width(name)}.2f}" for name, value in zip(names, values, strict=True))
        rows.append(f"{stage.stage:>5}{stage.parameters:>15,}" + cells)
    if estimate.peak.host:
        rows.append(f"and {estimate.peak.host / GIB:.1f} GiB of a rank in its host's memory")
    return "\n".join(["Memory of one rank, GiB", *rows])


def _width(name: str) -> int:
    return max(len(name), 6) + 2


def _traffic(estimate: Estimate) -> str:
    stage = estimate.peak.stage
    rows = [f"Communication of one rank of stage {stage} in a step"]
    rows.append(f"{'kind':<11}{'operation':<16}{'count':>9}{'GiB':>10}{'sent GiB':>10}{'ranks':>7}  link")
    rows += [
        f"{one.kind:<11}{one.operation:<16}{one.count:>9,}{one.size / GIB:>10.3f}{one.sent / GIB:>10.3f}"
        f"{one.group:>7}  {one.link}"
        for one in estimate.traffic[stage]
    ]
    return "\n".join(rows if estimate.traffic[stage] else ["Communication: none"])


def _speed(estimate: Estimate) -> str:
    speed = estimate.speed
    names = ("compute", "tensor", "context", "pipeline", "bubble", "offload", "data", "optimizer")
    parts = ", ".join(f"{name} {value:.3f}" for name in names if (value := getattr(speed, name)) >= 0.0005)
    return (
        f"Step  {speed.step:.2f} s = {parts}\n"
        f"      {speed.tokens_per_gpu:,.0f} tokens/s/GPU, {speed.tflops_per_gpu:.0f} model TFLOP/s/GPU (estimate)"
    )


def _checkpoint(estimate: Estimate) -> str:
    w = estimate.workload
    return f"Checkpoint  {describe_checkpoint(w.architecture, w.settings(), w.world_size, with_copy=w.copies_weights)}"


def describe_assumptions(estimate: Estimate) -> str:
    """Every assumption in force, and the datasheet."""
    gpu, values = estimate.gpu, asdict(estimate.assumptions)
    shares = [f"{field.name} {values[field.name]:.3g}" for field in fields(Assumptions)]
    shares[-2] = f"framework_bytes {values['framework_bytes'] / GIB:.3g} GiB"
    rates = (
        f"bf16 {gpu.bf16 / 1e12:.0f}, FP8 {gpu.fp8 / 1e12:.0f} TFLOP/s dense; memory "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s; NVLink {gpu.nvlink / 1e9:.0f}, network {gpu.network / 1e9:.0f} GB/s"
    )
    lines = [line for text in (", ".join(shares), rates, gpu.source) for line in textwrap.wrap(text, 110)]
    return "\n".join(f"{'' if number else 'Assumed':<9}{line}" for number, line in enumerate(lines))


def describe_proposals(estimates: list[Estimate]) -> str:
    """A table, best first."""
    columns = ("tensor", "pipeline", "virtual_pipeline", "context", "data", "micro_batch_size", "recompute")
    header = "".join(f"{name:>{len(name) + 2}}" for name in columns)
    uneven = any(len(set(estimate.workload.stage_layers)) > 1 for estimate in estimates)
    rows = [f"{header}{'GiB':>8}{'step s':>9}{'tokens/s/GPU':>14}{'TFLOP/s':>9}{'  layers' if uneven else ''}"]
    for estimate in estimates:
        cells = "".join(f"{getattr(estimate.workload, name):>{len(name) + 2}}" for name in columns)
        rows.append(
            f"{cells}{estimate.peak.total / GIB:>8.1f}{estimate.speed.step:>9.2f}{estimate.speed.tokens_per_gpu:>14,.0f}"
            f"{estimate.speed.tflops_per_gpu:>9.0f}" + (f"  {_layers(estimate.workload)}" if uneven else "")
        )
    return "\n".join([*rows, "(tensor parallel with sequence parallel)"])


def _layers(w: Workload) -> str:
    """Layers of the first stage, of each of those between, and of the last; one number where all are equal."""
    own = w.stage_layers
    return str(own[0]) if len(set(own)) == 1 else "+".join(map(str, [own[0], *own[1:-1][:1], own[-1]]))
