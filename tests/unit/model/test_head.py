"""The vocabulary-parallel loss and the selective head against torch in double precision, on one rank and on two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sstoken.model import head
from megatron_sstoken.model.backend import compiler_problem
from megatron_sstoken.model.head import IGNORE_INDEX, selective_head, vocabulary_parallel_loss
from megatron_sstoken.model.rows import HeadRows
from megatron_sstoken.selection.signals import PREDICTION_SIGNALS
from tests.helpers.distributed_runner import run_distributed

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
    losses = F.cross_entropy(wide[..., :WORDS].flatten(0, -2), targets.flatten(), reduction="none").view(SHAPE)
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
    torch.testing.assert_close(losses, torch.tensor([0.0, 2e4, 1e4]).unsqueeze(1).expand(SHAPE), rtol=0, atol=1e-2)
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


HIDDEN, TOKENS = 16, 23


def head_case(dtype=torch.float32, seed: int = 0, scored: int = 15, trained: int = 9, scale: float = 1.0):
    """hidden [23, 16], weight [128, 16], labels [23] of which `scored` are wanted, and a gradient for `trained` of those.

    The padded words point where the hidden states do: they would get the highest probability.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(TOKENS, HIDDEN, generator=generator)).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    weight[WORDS:] = hidden[:1] * 3
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    labels[:4] = torch.tensor([0, WORDS - 1, 63, 64])
    order = torch.randperm(TOKENS, generator=generator)
    labels[order[scored:]] = IGNORE_INDEX
    upstream = torch.zeros(TOKENS)
    upstream[order[:trained]] = torch.randn(trained, generator=generator)
    return hidden, weight, labels, upstream


def dense_head(hidden, weight, labels, upstream, words=WORDS):
    """Loss and signals of scored tokens, then the gradients: double precision, all logits at once."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight[:words].T
    F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX).backward(upstream.double())
    return dense_signals(logits.detach(), labels), hidden.grad, weight.grad


def dense_signals(logits, labels):
    """Loss and `PREDICTION_SIGNALS` of scored tokens, of logits [tokens, words] in double precision."""
    scored = labels != IGNORE_INDEX
    probabilities = logits[scored].softmax(-1)
    likeliest = probabilities.sort(-1, descending=True).values[:, :20]
    likeliest = likeliest / likeliest.sum(-1, keepdim=True)
    rows = {
        "loss": F.cross_entropy(logits[scored], labels[scored], reduction="none"),
        "entropy": -(probabilities * probabilities.log()).sum(-1),
        "top1": probabilities.amax(-1),
        "sum_p2": probabilities.square().sum(-1),
        "entropy_top20": -(likeliest * likeliest.log()).sum(-1),
    }
    return torch.stack([rows[name] for name in ("loss", *PREDICTION_SIGNALS)])


def run_head(hidden, weight, labels, upstream, group, words=WORDS, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    rows = selective_head(hidden, weight, labels, words, group, **options)
    rows[0].backward(upstream)
    return rows.detach(), hidden.grad, weight.grad


COUNTS = {"some": (15, 9), "all": (23, 23), "all scored": (23, 5), "none trained": (15, 0), "none scored": (0, 0)}


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("counts", COUNTS)
def test_selective_head(alone, monkeypatch, counts, chunk_rows):
    monkeypatch.setitem(head.CHUNK_ROWS, "cpu", chunk_rows)
    case = head_case(scored=COUNTS[counts][0], trained=COUNTS[counts][1])
    found, hidden_gradient, weight_gradient = run_head(*case, alone, signals=PREDICTION_SIGNALS)
    wanted, *wanted_gradients = dense_head(*case)
    scored = case[2] != IGNORE_INDEX
    assert found.dtype == torch.float32 and found[:, ~scored].isnan().all()
    torch.testing.assert_close(found[:, scored].double(), wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(hidden_gradient.double(), wanted_gradients[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(weight_gradient.double(), wanted_gradients[1], rtol=1e-5, atol=2e-6)
    assert (weight_gradient[WORDS:] == 0).all() and (hidden_gradient[case[3] == 0] == 0).all()
    for signals in ((), ("sum_p2",), ("entropy", "top1"), ("entropy_top20",)):
        fewer = run_head(*case, alone, signals=signals)[0]
        rows = [0, *(1 + PREDICTION_SIGNALS.index(name) for name in signals)]
        assert torch.equal(fewer.nan_to_num(-1), found[rows].nan_to_num(-1)), signals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signals_of_short_logits_are_reduced_in_fp32(alone, dtype):
    """They are those of the rounded logits, to fp32's precision."""
    hidden, weight, labels, upstream = head_case(dtype)
    found = run_head(hidden, weight, labels, upstream, alone, signals=PREDICTION_SIGNALS)[0][:, labels != IGNORE_INDEX]
    wanted = dense_signals((hidden @ weight[:WORDS].T).double(), labels)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)


def test_signals_of_predictions_that_are_sure(alone):
    """One word has all the probability; 1,000 nats lie between it and any other."""
    weight = torch.zeros(PADDED, HIDDEN)
    weight[5] = 1000 / HIDDEN
    found = run_head(
        torch.ones(1, HIDDEN), weight, torch.tensor([5]), torch.ones(1), alone, signals=PREDICTION_SIGNALS
    )[0]
    assert found[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("missing", [1, 4, 9])
def test_losses_whose_weight_is_zero_are_no_ones_else(alone, missing):
    """Where the host has said how many losses are trained on and some of their gradients are 0, the rest is as it was."""
    hidden, weight, labels, upstream = head_case()
    trained = upstream.nonzero().flatten()
    upstream[trained[len(trained) - missing :]] = 0.0
    (scored,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    rows = HeadRows(scored, scored, len(scored), num_trained=len(trained))
    _, *found = run_head(hidden, weight, labels, upstream, alone, rows=rows)
    _, *wanted = dense_head(hidden, weight, labels, upstream)
    for gradient, wanted_gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("trained", [0, 9, 15])
@pytest.mark.parametrize("first", [False, True])
def test_the_number_of_trained_rows_may_be_an_upper_bound(alone, monkeypatch, trained, first):
    """Then nobody waits for the device to count them, and all else stays as it was, also for row 0."""
    monkeypatch.setitem(head.CHUNK_ROWS, "cpu", 4)
    hidden, weight, labels, upstream = head_case(trained=trained)
    scored = (labels != IGNORE_INDEX).nonzero().flatten()
    upstream[scored[0]] = 0.7 * first
    rows = HeadRows(scored, scored, len(scored), num_trained=len(scored))
    wanted = run_head(hidden, weight, labels, upstream, alone)
    found = run_head(hidden, weight, labels, upstream, alone, rows=rows)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
def test_a_compiled_head_is_the_same(alone, monkeypatch):
    """In both types, over chunks of several sizes: losses, entropies and gradients within rounding of the plain one's."""
    monkeypatch.setitem(head.CHUNK_ROWS, "cpu", 4)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        case = head_case(dtype)
        for signals in ((), ("entropy", "top1"), PREDICTION_SIGNALS):
            plain = run_head(*case, alone, signals=signals)
            compiled = run_head(*case, alone, signals=signals, compiled=True)
            for one, other in zip(compiled, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_the_selective_head_keeps_precision(alone):
    """Logits around 60,000, all alike but for their rounding: losses and entropy are those of their differences."""
    hidden, weight, labels, upstream = head_case()
    shift = torch.full((TOKENS, 1), 256.0)
    far = run_head(
        torch.cat([hidden.round(), shift], 1), F.pad(weight.round(), (0, 1), value=256.0), labels, upstream, alone,
        signals=PREDICTION_SIGNALS,
    )[0]  # fmt: skip
    near = run_head(hidden.round(), weight.round(), labels, upstream, alone, signals=PREDICTION_SIGNALS)[0]
    torch.testing.assert_close(far, near, rtol=0, atol=2e-6, equal_nan=True)


def test_bf16_goes_in_and_fp32_sums_come_out(alone):
    """Weight gradients are summed over tokens in fp32: each element is off by the rounding of its terms only."""
    case = head_case(torch.bfloat16)
    found, hidden_gradient, weight_gradient = run_head(*case, alone)
    wanted, *wanted_gradients = dense_head(*case)
    assert found.dtype == torch.float32 and hidden_gradient.dtype == weight_gradient.dtype == torch.bfloat16
    # the logits are rounded to bf16, as those of a linear layer are
    torch.testing.assert_close(found[0, case[2] != IGNORE_INDEX].double(), wanted[0], rtol=2**-7, atol=0.05)
    for gradient, reference_gradient in zip((hidden_gradient, weight_gradient), wanted_gradients, strict=True):
        torch.testing.assert_close(
            gradient.double(), reference_gradient, rtol=2**-6, atol=2**-6 * float(reference_gradient.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_gets_the_sum(alone, dtype):
    """Two micro-batches add up in megatron's buffer, in fp32; autograd has nothing to add."""
    hidden, weight, labels, upstream = head_case(dtype)
    leaf = torch.nn.Parameter(weight.clone())
    leaf.main_grad, leaf.grad_added_to_main_grad = torch.zeros(PADDED, HIDDEN), False
    for _ in range(2):
        selective_head(hidden, leaf, labels, WORDS, alone)[0].backward(upstream)
    wanted = dense_head(hidden, weight, labels, upstream)[2]
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6 * float(wanted.abs().max())
    torch.testing.assert_close(leaf.main_grad.double(), 2 * wanted, rtol=1e-5, atol=2 * tolerance)
    assert leaf.grad is None and not leaf.grad_added_to_main_grad


def test_a_main_grad_in_bf16_is_left_to_autograd(alone):
    """The sum over a micro-batch is fp32 and rounded once; megatron's hook then adds it to the buffer."""
    hidden, weight, labels, upstream = head_case(torch.bfloat16)
    leaf = torch.nn.Parameter(weight.clone())
    leaf.main_grad, leaf.grad_added_to_main_grad = torch.zeros(PADDED, HIDDEN, dtype=torch.bfloat16), False
    selective_head(hidden, leaf, labels, WORDS, alone)[0].backward(upstream)
    in_fp32 = torch.nn.Parameter(weight.clone())
    in_fp32.main_grad, in_fp32.grad_added_to_main_grad = torch.zeros(PADDED, HIDDEN), False
    selective_head(hidden, in_fp32, labels, WORDS, alone)[0].backward(upstream)
    assert torch.equal(leaf.grad, in_fp32.main_grad.bfloat16()) and leaf.grad.any()
    assert not leaf.grad_added_to_main_grad and not leaf.main_grad.any()


def test_the_stand_in_sets_off_the_hook_and_adds_nothing():
    leaf = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    leaf.grad_added_to_main_grad, leaf.zero_out_wgrad = False, True
    found = head._stand_in(leaf)
    assert leaf.grad_added_to_main_grad and found.shape == leaf.shape and found.dtype == leaf.dtype and not found.any()


def test_a_frozen_weight_gets_no_gradient(alone):
    hidden, weight, labels, upstream = head_case()
    leaf = hidden.clone().requires_grad_()
    selective_head(leaf, weight, labels, WORDS, alone)[0].backward(upstream)
    torch.testing.assert_close(leaf.grad.double(), dense_head(*head_case())[1], rtol=1e-5, atol=2e-6)


def halves_of_head(rank: int, cases):
    """On each of two ranks: the selective head on its half of the words."""
    return [
        run_head(hidden, weight.chunk(2)[rank], labels, upstream, dist.group.WORLD, words, signals=PREDICTION_SIGNALS)
        for hidden, weight, labels, upstream, words in cases
    ]


def test_selective_head_on_two_ranks(alone):
    """Every count, one rank that holds padding only, vocabularies below 20 words or with a few on one rank, and bf16: the
    same as on one rank."""
    cases = [(*head_case(seed=number, scored=n, trained=k), WORDS) for number, (n, k) in enumerate(COUNTS.values())]
    hidden, weight, labels, upstream = head_case(seed=7)
    cases += [(hidden, F.pad(weight, (0, 0, 0, 80), value=50.0), labels, upstream, WORDS)]
    for words in (7, 70):
        few = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, labels % words)
        cases += [(hidden, weight, few, upstream, words)]
    cases += [(*head_case(torch.bfloat16, seed=8), WORDS)]
    for case, left, right in zip(cases, *run_distributed(halves_of_head, 2, cases), strict=True):
        in_fp32 = case[0].dtype == torch.float32
        alike = {"rtol": 1e-5, "atol": 2e-6} if in_fp32 else {"rtol": 2**-6, "atol": 2**-6}
        wanted = run_head(*case[:4], alone, case[4], signals=PREDICTION_SIGNALS)
        assert torch.equal(left[0].nan_to_num(-1), right[0].nan_to_num(-1)) and torch.equal(left[1], right[1])
        torch.testing.assert_close(left[0], wanted[0], rtol=1e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(left[1], wanted[1], **alike)
        torch.testing.assert_close(torch.cat([left[2], right[2]]), wanted[2], **alike)
        if in_fp32:
            dense = dense_head(*case)[0]
            torch.testing.assert_close(left[0][:, case[2] != IGNORE_INDEX].double(), dense, rtol=1e-6, atol=2e-6)
