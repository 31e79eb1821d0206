"""Tokens a second, time against plain fine-tuning, and memory: methods that alternate on one model, on the same batch."""

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.changes import apply
from benchmarks.gpu.results import NotHere, Results
from benchmarks.gpu.runs import (
    FULL,
    architecture_of,
    device_bytes,
    layers_that_fit,
    make_trainer,
    planned_memory,
    release_memory,
    settings_for,
)
from benchmarks.gpu.sections import FP8_8B, LORA_8B, SSTOKEN_1B, SSTOKEN_8B
from benchmarks.measure import Timing, alternate
from megatron_sstoken.config import Settings
from megatron_sstoken.device import have_cuda, peak_memory_bytes
from megatron_sstoken.model.backend import backend_of, compiler_problem, numerics_of
from megatron_sstoken.training.loop import Trainer, training_step
from megatron_sstoken.training.metrics import training_flops

GIB = 2**30
TABLE = "steps with the optimizer, alternating, on one global batch"


@dataclass(frozen=True)
class Variant:
    """What of a run is switched between two measurements, without building the model again."""

    method: str = "sstoken"
    head: Literal["selective", "standard"] = "selective"
    compiled: bool = False
    fused: bool | None = None
    """Whether weight gradients are added up inside the matrix product; None: as the run has it."""


PLAIN, PLAIN_SELECTIVE, RANDOM, SSTOKEN = (
    "full, standard head (plain fine-tuning)",
    "full, selective head",
    "random selection",
    "ssToken",
)
METHODS = {
    PLAIN: Variant("full", "standard"),
    PLAIN_SELECTIVE: Variant("full"),
    RANDOM: Variant("random"),
    SSTOKEN: Variant(),
}

FUSED = {"fused": True, "apart": False}
FUSES = "fuse_wgrad_accumulation"
"""Transformer Engine's name for it, as its linears take it and keep it."""


def eight_billion(results: Results) -> None:
    """8B shape with as many layers as fit; fewer where the planner promised too much."""
    settings, layers = _largest(results, "Llama-3.1-8B")
    while layers:
        case = f"8B shape, {layers} layers"
        if found := _unless_too_large(results, settings(layers), case):
            results.target(SSTOKEN_8B, found[SSTOKEN]["ratio"])
            return
        layers = layers * 3 // 4
    raise NotHere("not even one layer fits")


def one_billion(results: Results) -> None:
    """1B whole: the methods, short samples, and what is optional."""
    settings = settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, rows=8)
    variants = dict(METHODS)
    if backend_of(settings) == "transformer_engine":
        variants |= {f"ssToken, weight gradients {name}": Variant(fused=fused) for name, fused in FUSED.items()}
    else:
        results.absent("fused weight gradients", "the layers are not made of Transformer Engine's")
    large = apply(copy.deepcopy(settings), training__micro_batch_size=_largest_micro_batch(settings))
    case = f"1B, chats, micro-batches of {large.training.micro_batch_size} packs"
    found = compare(results, large, METHODS, case=case, rounds=6)
    results.target(SSTOKEN_1B, found[SSTOKEN]["ratio"])
    with results.attempt("micro-batches of one pack"):  # the host may not keep up with the GPU
        compare(results, settings, variants, case="1B, chats, micro-batches of one pack", rounds=4)
    with results.attempt("short samples"):
        _leave_time(results, 20)
        shown = {name: METHODS[name] for name in (PLAIN, SSTOKEN)}
        short = settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, kind="short", rows=8)
        compare(results, short, shown, case="1B, short samples packed", rounds=4)
    with results.attempt("compiled head"):  # last: compiling may take long
        _leave_time(results, 30)
        if problem := compiler_problem():
            raise NotHere(problem)
        shown = {SSTOKEN: METHODS[SSTOKEN], "ssToken, compiled head": Variant(compiled=True)}
        compare(results, large, shown, case=f"{case}, again", rounds=4)


def lora(results: Results) -> None:
    """LoRA of all layers of 8B; whole layers are recomputed where the planner, or the device, says that they must be."""
    settings = settings_for(results.work, "Llama-3.1-8B", tiny=results.tiny, rows=4, lora__rank=16, lora__alpha=32.0)
    fits = planned_memory(_as(settings, METHODS[PLAIN])).total <= FULL * device_bytes()
    for recompute in ("none", "full") if fits else ("full",):
        apply(settings, training__recompute=recompute)
        if found := _unless_too_large(results, settings, f"8B, LoRA of rank 16, recompute {recompute}"):
            results.target(LORA_8B, max(found[PLAIN]["tokens per s"], found[PLAIN_SELECTIVE]["tokens per s"]))
            return
    raise NotHere("it does not fit")


def fp8(results: Results) -> None:
    """The same model in bf16, in each recipe, and in bf16 again: two of them do not fit beside each other."""
    settings, layers = _largest(results, "Llama-3.1-8B", training__precision="fp8")
    recipes: list[dict[str, Any]] = [
        {"training__precision": "fp8", "training__fp8_recipe": recipe}
        for recipe in ("tensorwise", "blockwise", "delayed")
    ]
    bf16 = {"training__precision": "bf16"}
    shown = {name: METHODS[name] for name in (PLAIN_SELECTIVE, SSTOKEN)}
    speeds: dict[str, list[float]] = {}
    for changes in (bf16, *recipes, bf16):
        one = apply(settings(layers), **changes)
        with results.attempt(numerics_of(one)):
            _leave_time(results, 15)
            found = compare(results, one, shown, case=f"8B shape, {layers} layers", rounds=5)
            speeds.setdefault(one.training.precision, []).append(found[PLAIN_SELECTIVE]["tokens per s"])
    if len(speeds) == 2:
        results.target(FP8_8B, max(speeds["fp8"]) / statistics.mean(speeds["bf16"]))


def compare(
    results: Results, settings: Settings, variants: Mapping[str, Variant], *, case: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure variants of a run by whole steps, `rounds` times each; writes a row a variant, and returns the rows.

    The first variant is what the ratios are to. Memory is what torch has allocated at most, beside the planner's figure for
    it (without CUDA and fragments).
    """
    release_memory()
    trainer = make_trainer(settings)
    tokens, flops = work_of(trainer)
    peaks, numbers, fusing = dict.fromkeys(variants, 0), count(), fusing_layers(trainer)

    def step(name: str) -> None:
        use(trainer, variants[name], fusing)
        if have_cuda():
            torch.cuda.reset_peak_memory_stats()
        training_step(trainer, next(numbers))  # in order: a run makes batches ahead
        peaks[name] = max(peaks[name], peak_memory_bytes())

    functions: dict[str, Callable[[], Any]] = {name: partial(step, name) for name in variants}
    timings = alternate(functions, 1 if results.tiny else rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        seconds = timing.columns()["seconds"]
        row: dict[str, Any] = {
            "case": case,
            "numerics": numerics_of(settings),
            "method": name,
            "tokens per s": tokens / seconds,
        }
        row |= {"TFLOP/s": flops / seconds / 1e12} | _spread(timing)
        if same_head := timings.get(PLAIN_SELECTIVE):
            row["ratio to full, selective"] = float(np.median(timing.seconds / same_head.seconds))
        if have_cuda():
            planned = planned_memory(_as(settings, variants[name]), trainer.plan.architecture)
            row |= {"peak GiB": peaks[name] / GIB, "planned GiB": (planned.total - planned.framework) / GIB}
        results.row(TABLE, **row)
        rows[name] = row
    return rows


def work_of(trainer: Trainer) -> tuple[int, float]:
    """Real tokens of global batch 0, and the operations of plain fine-tuning on them."""
    batches = trainer.loader.load(0)
    tokens = sum(sum(batch.facts.sample_lengths) for batch in batches)
    return tokens, sum(training_flops(batch, trainer.plan.architecture) for batch in batches)


def use(trainer: Trainer, variant: Variant, fusing: Mapping[torch.nn.Module, bool]) -> None:
    """Switch a trainer to a variant. `fusing`: the layers that can fuse weight gradients, and whether they did when built."""
    trainer.settings.selection.method = variant.method
    trainer.model.captured_layers = trainer.plan.captured_layers if variant.method == "sstoken" else ()
    for chunk in trainer.model.unwrapped:
        chunk.head = replace(chunk.head, selective=variant.head == "selective", compiled=variant.compiled)
    for module, as_built in fusing.items():
        module.fuse_wgrad_accumulation = as_built if variant.fused is None else variant.fused  # type: ignore[assignment]


def fusing_layers(trainer: Trainer) -> dict[torch.nn.Module, bool]:
    """Transformer Engine's linears, and whether each adds its weight gradients up inside the matrix product."""
    modules = [module for chunk in trainer.model.unwrapped for module in chunk.modules()]
    return {module: bool(module.fuse_wgrad_accumulation) for module in modules if hasattr(module, FUSES)}


def _unless_too_large(results: Results, settings: Settings, case: str) -> dict[str, dict[str, Any]] | None:
    """The methods compared, or None where the device has not the memory that the planner thought enough."""
    try:
        return compare(results, settings, METHODS, case=case, rounds=5)
    except torch.OutOfMemoryError:
        results.absent(case, "the planner says that it fits, and it does not")
        return None


def _largest_micro_batch(settings: Settings) -> int:
    """How many packs, up to 4, this device takes at once with all logits, by the planner; they divide the global batch."""
    for size in (4, 3, 2):
        larger = apply(copy.deepcopy(_as(settings, METHODS[PLAIN])), training__micro_batch_size=size)
        if settings.training.global_batch_size % size == 0 and planned_memory(larger).total <= FULL * device_bytes():
            return size
    return 1


def _leave_time(results: Results, seconds: float) -> None:
    """Raise NotHere where less than this is left."""
    if results.seconds_left < seconds and not results.tiny:
        raise NotHere("no time was left")


def _largest(results: Results, name: str, **changes: Any) -> tuple[Callable[[int], Settings], int]:
    """Settings of a model with a number of layers, and the number that fits this device with the standard head."""

    def settings(layers: int) -> Settings:
        return settings_for(results.work, name, tiny=results.tiny, layers=layers)

    architecture = architecture_of(name, results.tiny)
    largest = apply(settings(architecture.num_layers), model__head="standard", **changes)
    layers = layers_that_fit(largest, architecture)
    if not layers:
        raise NotHere(f"not one layer of {name} fits {device_bytes() / GIB:.0f} GiB with its head and embedding")
    return settings, layers


def _as(settings: Settings, variant: Variant) -> Settings:
    """The settings of a run that is a variant, for the planner."""
    model, selection = replace(settings.model, head=variant.head), replace(settings.selection, method=variant.method)
    return replace(settings, model=model, selection=selection)


def _spread(timing: Timing) -> dict[str, Any]:
    c = timing.columns()
    spread = f"{c['seconds_p20']:.4g} to {c['seconds_p80']:.4g}"
    return {
        "s": c["seconds"],
        "s, p20 to p80": spread,
        "ratio": c["ratio"],
        "ratio, p20 to p80": f"{c['ratio_p20']:.4g} to {c['ratio_p80']:.4g}",
    }
