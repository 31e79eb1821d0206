"""Saving and going on: a run that goes on from its checkpoint must come where the run came that was not stopped."""

import os

import torch

from benchmarks.changes import apply
from benchmarks.gpu.results import Results
from benchmarks.gpu.runs import make_trainer, settings_for
from megatron_sstoken.training.loop import Trainer, train

SAVED, STEPS = 2, 4
BOUND = 1e-6
"""Of the norm of the weights' difference ÷ the norm of what two steps change."""


def run(results: Results) -> None:
    """Four steps; then the last two again from the checkpoint of the second."""
    # cuDNN otherwise adds in another order each time in the backward pass of attention, and Adam makes much of little at first.
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    settings = settings_for(results.work, "Llama-3.2-1B", tiny=results.tiny, layers=3, vocabulary=8192, rows=8)
    apply(settings, data__shuffle=True, training__global_batch_size=2)
    settings.training.steps = STEPS
    settings.optimizer.learning_rate, settings.optimizer.warmup_fraction = 1e-4, 0.0
    settings.checkpoint.directory, settings.checkpoint.save_every = str(results.work / "run"), SAVED
    settings.checkpoint.keep = 0
    trainer = make_trainer(settings)
    before = weights_of(trainer)
    train(trainer)
    straight = weights_of(trainer)
    del trainer
    settings.checkpoint.resume = SAVED
    trainer = make_trainer(settings)
    results.check("steps done where it goes on", abs(trainer.step - SAVED), 0)
    saved = weights_of(trainer)
    train(trainer)
    resumed = weights_of(trainer)
    equal = all(torch.equal(resumed[name], straight[name]) for name in straight)
    results.row(
        "weights after the last step", **{"parameters": sum(w.numel() for w in straight.values()), "equal": equal}
    )
    moved = _distance(straight, before)
    results.check("what the steps change, ÷ norm of the weights", moved / _norm(before), 1e-8, at_least=True)
    difference = _distance(resumed, straight) / max(_distance(straight, saved), 1e-30)
    results.check("difference of the weights, ÷ what two steps change", difference, BOUND)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The master weights' bf16 copies, as the next step would use them, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for chunk in trainer.model.unwrapped
        for name, parameter in chunk.named_parameters()
    }


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return _norm({name: a[name].float() - b[name].float() for name in a})


def _norm(values: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.float().norm() for value in values.values()]).norm())
