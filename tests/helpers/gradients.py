"""One global batch on every rank: loss, token records and whole gradients, to be compared between layouts."""

from typing import Any

import torch

from megatron_sstoken.config import Settings
from megatron_sstoken.model.families import Split
from megatron_sstoken.model.weights import rules_of_chunk, to_hugging_face
from megatron_sstoken.parallel import gather_objects, reset_layout
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_trainer, part_name

AT_ONCE = 6
"""Layouts that a process makes one after another: it keeps the threads of each, dozens, which every message wakes."""


def results_of(settings: list[Settings], num_ranks: int, timeout: float = 120) -> list[Any]:
    """What `run_cases` finds on process 0, in fresh processes for every few of the settings."""
    parts = [settings[start : start + AT_ONCE] for start in range(0, len(settings), AT_ONCE)]
    return [result for part in parts for result in run_distributed(run_cases, num_ranks, part, timeout=timeout)[0]]


def run_cases(rank, settings, before=lambda trainer: None):
    """One global batch with each of the settings: loss, token records and gradients by Hugging Face name (rank 0).

    `before`: what to do with each trainer first.
    """
    from megatron_sstoken.passes.columns import gather_columns
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.selector import selector_of, train_on_selected

    results = []
    for one in settings:
        trainer = make_trainer(one)
        model, layout = trainer.model, trainer.layout
        before(trainer)
        model.zero_gradients()
        selector = selector_of(one, layout, gamma=one.selection.gamma, step=0, history=trainer.history)
        reports = train_on_selected(model, trainer.loader.load(0), selector, whole_gradients=True)
        loss = summarize(reports, model.architecture, layout).loss_selected
        gradients = gather_whole(model, lambda parameter: parameter.main_grad)
        parts = gather_objects(gather_columns(reports, layout), layout)
        if rank == 0:
            results.append((loss, next(part for part in parts if part is not None), gradients))
        reset_layout()
    return results


def gather_whole(model, value):
    """`value(parameter)` of all ranks' slices put together, by Hugging Face name: gradients, or weights. All ranks call it."""
    found = {}
    for chunk in model.unwrapped:
        rules = rules_of_chunk(chunk, model.architecture)
        for name, parameter in chunk.named_parameters():
            found[rules[name]] = (model.layout.tensor_rank, value(parameter).detach().clone())
    return _whole(model.architecture, gather_objects(found, model.layout))


def _whole(architecture, parts):
    """Slices of all ranks, (rule, layer) → (tensor rank, value) → values by Hugging Face name."""
    whole = {}
    for rule, layer in {key for part in parts for key in part}:
        slices = dict(part[rule, layer] for part in parts if (rule, layer) in part)
        ordered = [slices[number] for number in sorted(slices)]
        if rule.split is Split.GATED and rule.expert is None:
            halves = [piece.chunk(2) for piece in ordered]
            gradient = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        elif rule.split is Split.WHOLE or rule.expert is not None:
            gradient = ordered[0]
        else:
            gradient = torch.cat(ordered, dim=1 if rule.split is Split.COLUMNS else 0)
        tensors = to_hugging_face(rule, layer, gradient, architecture)
        whole |= {part_name(name, rule.part): value for name, value in tensors}
    return whole


def largest_difference(found, wanted):
    """Largest difference of any gradient, relative to the largest element of its tensor; NaN where one is NaN.

    Where all of a tensor is zero, as of an expert without tokens, nothing but zero is no difference.
    """
    assert found.keys() == wanted.keys()
    smallest = torch.finfo(torch.float32).tiny
    ratios = [
        (found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=smallest) for name in wanted
    ]
    return float(torch.stack(ratios).max())  # torch's keeps NaN; Python's would lose it among others
