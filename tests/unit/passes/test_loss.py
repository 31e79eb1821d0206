"""Weights and counts of the three loss averages, against means written out."""

from dataclasses import replace

import pytest
import torch

from megatron_sstoken.passes.loss import loss_weights
from tests.helpers.token_batches import make_batch

TURNS = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1]]
SELECTED = [[1, 2], [3], []]  # positions, by sample


@pytest.fixture
def case():
    batch = make_batch(TURNS, 5)
    mask = torch.zeros(len(batch.position), dtype=torch.bool)
    for sample, positions in enumerate(SELECTED):
        for position in positions:
            mask[(batch.segment == sample) & (batch.position == position)] = True
    losses = torch.arange(len(mask), dtype=torch.float32) ** 2
    per_sample = [losses[mask & (batch.segment == sample)] for sample in range(3)]
    return batch, mask, losses, per_sample


def mean_of(case, average):
    batch, mask, losses, _ = case
    weights, count = loss_weights(mask, batch, average)
    assert weights.dtype == torch.float32 and count.dtype == torch.int and count.dim() == 0
    assert (weights[~mask] == 0).all()
    return float((weights * losses).sum() / count)


def test_token(case):
    assert mean_of(case, "token") == pytest.approx(float(torch.cat(case[3]).mean()))


def test_sample_counts_samples_without_a_selected_token(case):
    means = [float(values.mean()) if len(values) else 0.0 for values in case[3]]
    assert mean_of(case, "sample") == pytest.approx(sum(means) / 3)


def test_microbatch(case):
    assert mean_of(case, "microbatch") == pytest.approx(float(torch.cat(case[3]).mean()))
    assert int(loss_weights(case[1], case[0], "microbatch")[1]) == 1


@pytest.mark.parametrize("average", ["token", "sample", "microbatch"])
def test_an_empty_micro_batch_counts_nothing(average):
    padding = torch.full((4,), -1)
    batch = replace(make_batch([[0, 1]], 4), segment=padding, sample=padding, num_segments=0)
    mask = torch.zeros(4, dtype=torch.bool)
    weights, count = loss_weights(mask, batch, average)
    assert int(count) == 0 and not weights.any()
