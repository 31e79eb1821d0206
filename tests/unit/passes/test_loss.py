"""Weights and counts of the three loss averages and the three divisors, against means written out."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_sstoken.passes.loss import LossRule, loss_weights, token_weights
from megatron_sstoken.selection.weights import find_weight
from tests.helpers.token_batches import make_batch

TURNS = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1]]
SELECTED = [[1, 2], [3], []]  # positions, by sample
WEIGHTS = [[0, 0.3, 1.7, 1], [0, 0, 0.25, 2.5], [0, 1]]


def mask_of(batch):
    mask = torch.zeros(len(batch.position), dtype=torch.bool)
    for sample, positions in enumerate(SELECTED):
        for position in positions:
            mask[(batch.segment == sample) & (batch.position == position)] = True
    return mask


def weights_of(batch):
    """WEIGHTS, laid out as the batch is."""
    pairs = zip(batch.segment.tolist(), batch.position.tolist(), strict=True)
    return torch.tensor([WEIGHTS[segment][position] if segment >= 0 else 0.0 for segment, position in pairs])


@pytest.fixture
def case():
    batch = make_batch(TURNS, 5)
    mask = mask_of(batch)
    losses = torch.arange(len(mask), dtype=torch.float32) ** 2
    per_sample = [losses[mask & (batch.segment == sample)] for sample in range(3)]
    return batch, mask, losses, per_sample


def mean_of(case, average):
    batch, mask, losses, _ = case
    weights, counted = loss_weights(mask, None, batch, LossRule(average))
    assert weights.dtype == torch.float32 and counted.dtype == torch.bool and counted.shape == weights.shape
    assert (weights[~mask] == 0).all()
    return float((weights * losses).sum() / counted.sum())


def test_token(case):
    assert mean_of(case, "token") == pytest.approx(float(torch.cat(case[3]).mean()))


def test_sample_counts_samples_without_a_selected_token(case):
    means = [float(values.mean()) if len(values) else 0.0 for values in case[3]]
    assert mean_of(case, "sample") == pytest.approx(sum(means) / 3)


def test_microbatch(case):
    assert mean_of(case, "microbatch") == pytest.approx(float(torch.cat(case[3]).mean()))
    assert int(loss_weights(case[1], None, case[0], LossRule("microbatch"))[1].sum()) == 1


@pytest.mark.parametrize("average", ["token", "sample", "microbatch"])
def test_an_empty_micro_batch_counts_nothing(average):
    padding = torch.full((4,), -1)
    batch = replace(make_batch([[0, 1]], 4), segment=padding, sample=padding, num_segments=0)
    mask = torch.zeros(4, dtype=torch.bool)
    weights, counted = loss_weights(mask, None, batch, LossRule(average))
    assert not counted.any() and not weights.any()


def wanted(average, divisor, losses, batch, weight=lambda s, p, loss: WEIGHTS[s][p]):
    """The loss by its definition: sums of weighted losses over what they are divided by, in one group or a mean of groups."""
    place = {(s, p): t for t, (s, p) in enumerate(zip(batch.segment.tolist(), batch.position.tolist(), strict=True))}

    def of_group(samples):
        chosen = [(s, p) for s in samples for p in SELECTED[s]]
        known = [float(losses[place[at]]) for at in chosen]
        weights = [weight(*at, loss) for at, loss in zip(chosen, known, strict=True)]
        total = sum(one * loss for one, loss in zip(weights, known, strict=True))
        responses = sum(sum(TURNS[s][1:]) for s in samples)
        by = {"selected": len(chosen), "response": responses, "weight": sum(weights)}[divisor]
        return total / by if by else 0.0

    groups = [[0], [1], [2]] if average == "sample" else [[0, 1, 2]]
    return sum(map(of_group, groups)) / len(groups)


BOTH = list(itertools.product(["token", "sample", "microbatch"], ["selected", "response", "weight"]))


def loss_of(batch, losses, rule):
    """The loss of a global batch of one micro-batch, `losses` being known of response tokens alone."""
    mask = mask_of(batch)
    losses = torch.where(batch.response, losses, torch.nan)
    weights, counted = loss_weights(mask, token_weights({"loss": losses}, batch, rule), batch, rule)
    count = weights.sum() if rule.scales_afterwards else counted.sum()
    return float((weights * losses)[mask].sum() / count)


@pytest.mark.parametrize(("average", "divisor"), BOTH)
def test_weights_and_divisors(average, divisor):
    batch = make_batch(TURNS, 5)
    batch = replace(batch, weight=weights_of(batch))
    losses = torch.arange(len(batch.position), dtype=torch.float32) ** 2
    found = loss_of(batch, losses, LossRule(average, divisor))
    assert found == pytest.approx(wanted(average, divisor, losses, batch), rel=1e-6)


@pytest.mark.parametrize("of_the_data", [False, True])
@pytest.mark.parametrize(("average", "divisor"), BOTH)
def test_soft_weights_and_divisors(average, divisor, of_the_data):
    """Alone and times the data's own; tokens without a loss are unknown, not zero."""
    batch = make_batch(TURNS, 5)
    losses = 0.3 * torch.arange(len(batch.position), dtype=torch.float32)
    if of_the_data:
        batch = replace(batch, weight=weights_of(batch))

    def weight(s, p, loss):
        return math.exp(-0.7 * loss) * (WEIGHTS[s][p] if of_the_data else 1)

    found = loss_of(batch, losses, LossRule(average, divisor, find_weight("power").at(0.7)))
    assert found == pytest.approx(wanted(average, divisor, losses, batch, weight), rel=1e-5)


@pytest.mark.parametrize(("average", "divisor"), BOTH)
def test_an_exponent_of_zero_is_no_weight(average, divisor):
    """Bit for bit, and where p is too small for a number."""
    batch, mask = make_batch(TURNS, 5), mask_of(make_batch(TURNS, 5))
    losses = 50 * torch.arange(len(batch.position), dtype=torch.float32)
    rule = LossRule(average, divisor, find_weight("power").at(0.0))
    found, counted = loss_weights(mask, token_weights({"loss": losses}, batch, rule), batch, rule)
    plain, plain_counted = loss_weights(mask, None, batch, LossRule(average, divisor))
    assert torch.equal(found, plain) and torch.equal(counted, plain_counted)
