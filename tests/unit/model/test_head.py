"""The vocabulary-parallel loss against torch's cross-entropy in double precision, on one rank and on two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sstoken.model.head import vocabulary_parallel_loss
from tests.distributed_runner import run_distributed

WORDS, PADDED = 99, 128
SHAPE = (3, 7)


@pytest.fixture(scope="module")
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_case(dtype=torch.float32, scale: float = 3.0, seed: int = 0):
    """Logits [3, 7, 128], targets that include both ends of the vocabulary, and the gradient of the losses.

    The padded columns hold the largest logits: any probability that they got would show.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(*SHAPE, PADDED, generator=generator)).to(dtype)
    logits[..., WORDS:] = 5 * scale
    targets = torch.randint(WORDS, SHAPE, generator=generator)
    targets[0, :4] = torch.tensor([0, WORDS - 1, 63, 64])
    return logits, targets, torch.randn(SHAPE, generator=generator)


def reference(logits, targets, upstream):
    """Losses and gradient of the logits in double precision, over the real words alone; 0 for the padding."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide[..., :WORDS].flatten(0, -2), targets.flatten(), reduction="none").view(
        SHAPE
    )
    losses.backward(upstream.double())
    return losses.detach(), wide.grad


def measure(logits, targets, upstream, group):
    logits = logits.clone().requires_grad_()
    losses = vocabulary_parallel_loss(logits, targets, WORDS, group)
    losses.backward(upstream)
    return losses.detach(), logits.grad


@pytest.mark.parametrize("scale", [0.0, 3.0, 100.0])
def test_one_rank(alone, scale):
    case = make_case(scale=scale)
    losses, gradient = measure(*case, alone)
    wanted, wanted_gradient = reference(*case)
    assert losses.dtype == torch.float32 and gradient.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=0, atol=1e-6)
    assert (gradient[..., WORDS:] == 0).all() and (gradient[..., :WORDS] != 0).any()


def test_bf16_logits_are_reduced_in_fp32(alone):
    case = make_case(torch.bfloat16)
    losses, gradient = measure(*case, alone)
    wanted, wanted_gradient = reference(*case)
    assert losses.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2**-8, atol=1e-6)


def test_extreme_logits(alone):
    logits = torch.zeros(*SHAPE, PADDED)
    logits[..., 5] = 1e4
    logits[..., 6] = -1e4
    targets = torch.full(SHAPE, 5)
    targets[1], targets[2] = 6, 7
    losses, gradient = measure(logits, targets, torch.ones(SHAPE), alone)
    torch.testing.assert_close(
        losses, torch.tensor([0.0, 2e4, 1e4]).unsqueeze(1).expand(SHAPE), rtol=0, atol=1e-2
    )
    wanted = torch.zeros_like(logits)
    wanted[1:, :, 5], wanted[1, :, 6], wanted[2, :, 7] = 1.0, -1.0, -1.0
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1024.0, -65536.0])
def test_a_shift_of_all_logits_changes_nothing(alone, shift):
    """Nor does the padding come into play where all logits are far below zero."""
    logits, targets, upstream = make_case()
    logits = logits.round()  # whole numbers: the shift is exact
    shifted, shifted_gradient = measure(logits + shift, targets, upstream, alone)
    losses, gradient = measure(logits, targets, upstream, alone)
    torch.testing.assert_close(shifted, losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [PADDED, WORDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_not_changed(alone, dtype, width):
    logits, targets, upstream = make_case(dtype)
    logits = logits[..., :width].contiguous()
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0  # as the output of the head: not a leaf, and wanted by others as well
    losses = vocabulary_parallel_loss(inner, targets, WORDS, alone)
    assert torch.equal(inner, logits)
    losses.backward(upstream)
    assert torch.equal(inner, logits)


def test_a_vocabulary_without_padding(alone):
    logits, targets, upstream = make_case()
    logits = logits[..., :WORDS].contiguous()
    losses, gradient = measure(logits, targets, upstream, alone)
    wanted, wanted_gradient = reference(logits, targets, upstream)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=0, atol=1e-6)


def test_numerical_gradient(alone):
    """The backward pass belongs to this forward pass: central differences along random directions."""
    logits, targets, upstream = make_case(scale=1.0)
    gradient = measure(logits, targets, upstream, alone)[1].double()
    for seed in range(3):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        direction[..., WORDS:] *= 100  # where nothing may change
        step = 1e-2
        moved = [logits + sign * step * direction for sign in (1, -1)]
        ahead, behind = (
            (vocabulary_parallel_loss(at, targets, WORDS, alone) * upstream).double().sum() for at in moved
        )
        slope = float((ahead - behind) / (2 * step))
        assert slope == pytest.approx(float((gradient * direction).sum()), abs=2e-3)


def halves(rank: int, cases):
    """On each of two ranks: losses and gradients of its half of the columns, in two splits."""
    results = []
    for logits, targets, upstream in cases:
        width = logits.shape[-1] // 2
        local = logits[..., rank * width : (rank + 1) * width].contiguous()
        losses, gradient = measure(local, targets, upstream, dist.group.WORLD)
        untouched = local.clone()
        vocabulary_parallel_loss(local, targets, WORDS, dist.group.WORLD)
        results.append((losses, gradient, torch.equal(local, untouched)))
    return results


def test_two_ranks(alone):
    """A border at word 64, and one so late (104) that the second rank holds padding only; extremes; bf16."""
    wide = [F.pad(make_case(seed=4)[0], (0, 80), value=50.0), *make_case(seed=4)[1:]]
    extreme = make_case(scale=1e4, seed=5)
    cases = [make_case(seed=1), wide, extreme, make_case(torch.bfloat16, seed=6)]
    assert wide[0].shape[-1] // 2 > WORDS
    first, second = run_distributed(halves, 2, cases)
    for case, (losses, left, kept), (same, right, kept_too) in zip(cases, first, second, strict=True):
        wanted, wanted_gradient = measure(*case, alone)
        assert torch.equal(losses, same) and kept and kept_too
        torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(torch.cat([left, right], dim=-1), wanted_gradient, rtol=1e-5, atol=1e-6)
        double, double_gradient = reference(*case)
        torch.testing.assert_close(losses.double(), double, rtol=1e-6, atol=1e-5)
        tolerance = 2**-8 if left.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            torch.cat([left, right], dim=-1).double(), double_gradient, rtol=tolerance, atol=1e-6
        )
