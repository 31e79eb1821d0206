"""Three training steps from the same weights on the same data in several numerics, against torch in fp32."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.changes import apply
from benchmarks.gpu.results import Results
from benchmarks.gpu.runs import LENGTH, TINY, make_trainer, settings_for
from benchmarks.stand_ins import save_random_model
from megatron_sstoken.config import Settings
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.training.loop import training_step

STEPS = 3
REFERENCE: dict[str, Any] = {"training__precision": "fp32", "model__backend": "torch"}
OTHERS: tuple[dict[str, Any], ...] = (
    {"training__precision": "bf16", "model__backend": "torch"},
    {"training__precision": "bf16", "model__backend": "transformer_engine"},
    {"training__precision": "fp8", "training__fp8_recipe": "tensorwise"},
    {"training__precision": "fp8", "training__fp8_recipe": "blockwise"},
    {"training__precision": "fp8", "training__fp8_recipe": "delayed"},
)
BOUNDS = {"bf16": (0.02, 0.05, 0.95), "fp8": (0.05, 0.15, 0.85)}
"""Relative difference of loss and gradient norm at most, share of tokens selected by both at least. The scores of weights drawn
at random lie close together: FP8 moved a tenth of the tokens across the threshold when this was measured."""
MODEL, HISTORY = "model", "history"
VOCABULARY = 8192
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What one training step gave."""

    loss: float
    norm: float
    selected: np.ndarray
    """int64: which tokens, ascending."""


def run(results: Results) -> None:
    """The reference, then every numerics that this machine has."""
    shape = TINY if results.tiny else SHAPE
    for seed, name in enumerate((MODEL, HISTORY)):
        save_random_model(results.work / name, LlamaConfig(**shape, initializer_range=0.05), seed=seed)
    settings = _settings(results, REFERENCE)
    reference = _train(settings)
    for changes in OTHERS:
        settings = _settings(results, changes)
        with results.attempt(" ".join(map(str, changes.values()))):
            _compare(results, numerics_of(settings), BOUNDS[settings.training.precision], _train(settings), reference)


def _compare(
    results: Results, name: str, bounds: tuple[float, float, float], steps: list[Step], reference: list[Step]
) -> None:
    loss_bound, norm_bound, overlap_bound = bounds
    for number, (found, wanted) in enumerate(zip(steps, reference, strict=True), 1):
        both = len(np.intersect1d(found.selected, wanted.selected)) / len(wanted.selected)
        results.row(
            "steps", numerics=name, step=number, loss=found.loss, **{"loss in fp32": wanted.loss},
            norm=found.norm, **{"norm in fp32": wanted.norm, "selected by both": both},
        )  # fmt: skip
        case = f"{name}, step {number}"
        results.check(f"{case}: relative difference of the loss", abs(found.loss / wanted.loss - 1), loss_bound)
        results.check(f"{case}: relative difference of the norm", abs(found.norm / wanted.norm - 1), norm_bound)
        results.check(f"{case}: share selected by both", both, overlap_bound, at_least=True)


def _settings(results: Results, changes: dict[str, Any]) -> Settings:
    """A run on a model of this section's own."""
    settings = settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, vocabulary=VOCABULARY, rows=8)
    settings.model.hf_path, settings.history.hf_path = str(results.work / MODEL), str(results.work / HISTORY)
    apply(settings, data__shuffle=True, training__global_batch_size=2)
    settings.optimizer.learning_rate = 1e-4
    settings.optimizer.schedule, settings.optimizer.warmup_fraction = "constant", 0.0
    return apply(settings, **changes)


def _train(settings: Settings) -> list[Step]:
    trainer = make_trainer(settings, scored=True)
    steps = []
    for number in range(STEPS):
        metrics, norm, reports = training_step(trainer, number)
        chosen = []
        for report in reports:
            assert report.selection is not None
            mask = report.selection.mask
            chosen.append((report.batch.sample[mask] * 2**20 + report.batch.position[mask]).cpu())
        steps.append(Step(metrics.loss_selected, norm, np.unique(torch.cat(chosen).numpy())))
    return steps
