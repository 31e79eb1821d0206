"""Micro-batches and reports made by hand, for tests of what is done with them."""

import torch

from megatron_sstoken.config import SelectionSettings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.selection.methods import Selection
from megatron_sstoken.training.selector import Selector

TURNS = [[0, 0, 1, 1, 0, 1], [1, 0, 1, 1], [0, 1]]
"""Roles of three samples: several turns, a response at the start, and the shortest that is trained on."""


def make_batch(
    roles: list[list[int]],
    row_length: int,
    *,
    num_rows: int | None = None,
    first_sample: int = 0,
    history: bool = True,
    seed: int = 0,
) -> TokenBatch:
    """A row of `row_length` for each sample, given by its roles; random tokens and history losses.

    Sample numbers go up in steps of 2 from `first_sample`. The last of `num_rows` rows may be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(roles) if num_rows is None else num_rows
    total = num_rows * row_length
    tokens, labels, position = (torch.zeros(total, dtype=torch.int64) for _ in range(3))
    segment, sample = (torch.full((total,), -1) for _ in range(2))
    context, response = (torch.zeros(total, dtype=torch.bool) for _ in range(2))
    past = torch.full((total,), torch.nan)
    lengths = []
    for number, row in enumerate(roles):
        start = number * row_length
        for i, role in enumerate(row):
            t = start + i
            tokens[t] = int(torch.randint(1, 90, (), generator=generator))
            if i > 0:
                labels[t - 1] = tokens[t]
                past[t] = 5 * torch.rand((), generator=generator)
            position[t], segment[t], sample[t] = i, number, first_sample + 2 * number
            context[t], response[t] = role == 0, role == 1 and i > 0
        lengths += [length for length in (len(row), row_length - len(row)) if length]
    lengths += [row_length] * (num_rows - len(roles))
    return TokenBatch(
        tokens=tokens.unsqueeze(0),
        labels=labels.unsqueeze(0),
        position=position,
        segment=segment,
        sample=sample,
        context=context,
        response=response,
        history_loss=past if history else None,
        lengths=lengths,
        num_segments=len(roles),
    )


def make_report(batch: TokenBatch, *, seed: int = 0, selected: bool = True, attention: bool = True) -> TokenReport:
    """Random losses and attention; with `selected` a random half of the response tokens is."""
    generator = torch.Generator().manual_seed(100 + seed)
    size = len(batch.position)
    predicted = (batch.segment >= 0) & (batch.position > 0)
    loss = torch.where(predicted, 5 * torch.rand(size, generator=generator), torch.nan)
    masses = torch.rand(size, generator=generator)
    selection = None
    if selected:
        score, rel_norm = (torch.rand(size, generator=generator) for _ in range(2))
        mask = batch.response & (torch.rand(size, generator=generator) < 0.5)
        selection = Selection(mask, score, rel_norm, torch.full((batch.num_segments,), torch.nan))
    values = {"loss": loss} | ({"attention": masses} if attention else {})
    return TokenReport(batch, values, selection)


def make_selector(gamma: float = 0.5, seed: int = 1, step: int = 2, **changes) -> Selector:
    """A selector of this process alone, with the default settings but for `changes`."""
    return Selector(SelectionSettings(**changes), gamma=gamma, seed=seed, step=step, group=None)


def indices(mask: torch.Tensor) -> list[int]:
    """Where a mask [T] is true."""
    return mask.nonzero().flatten().tolist()
