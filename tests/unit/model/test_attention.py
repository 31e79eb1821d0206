"""Core attention on packed samples, and the attention capture, against one dense softmax over all tokens."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_sstoken.model.attention import (
    AttentionCapture,
    TorchCoreAttention,
    core_attention_builder,
    sample_bounds,
)

LENGTHS = [5, 1, 9, 3]
TOKENS, HEAD_DIM = sum(LENGTHS), 8
LAYER = 3
CPU = torch.device("cpu")


def make_core(scale: float | None = None, window: int | None = None, sinks=None) -> TorchCoreAttention:
    core = TorchCoreAttention(config_of(window, sinks), LAYER, softmax_scale=scale)
    if sinks is not None:
        core.softmax_offset.data.copy_(sinks)
    return core


def config_of(window=None, sinks=None):
    """What the core attention reads of megatron's configuration; `window` counts the token itself."""
    return SimpleNamespace(
        kv_channels=HEAD_DIM,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        softmax_type="vanilla" if sinks is None else "learnable",
        num_attention_heads=0 if sinks is None else len(sinks),
        tensor_model_parallel_size=1,
        params_dtype=torch.float64,
    )


def make_qkv(heads: int, groups: int, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(TOKENS, num, HEAD_DIM, generator=generator, dtype=dtype).requires_grad_()
        for num in (heads, groups, groups)
    ]


def dense_probabilities(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: int = TOKENS, sinks=None
) -> torch.Tensor:
    """softmax [heads, tokens, tokens], block-diagonal by sample, causal and windowed; one product for each head.

    With a sink the probability of one more column, which is left out.
    """
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    index = torch.arange(TOKENS)
    distance = index[:, None] - index
    allowed = (owner[:, None] == owner) & (distance >= 0) & (distance < window)
    per_group = q.shape[1] // k.shape[1]
    rows = []
    for head in range(q.shape[1]):
        products = q[:, head] @ k[:, head // per_group].T * scale
        products = products.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            products = torch.cat([products, sinks[head].expand(len(index), 1)], dim=1)
        rows.append(products.softmax(dim=-1)[:, : len(index)])
    return torch.stack(rows)


def dense_attention(q, k, v, scale: float, window: int = TOKENS, sinks=None) -> torch.Tensor:
    per_group = q.shape[1] // k.shape[1]
    probabilities = dense_probabilities(q, k, scale, window, sinks)
    return torch.cat([probabilities[head] @ v[:, head // per_group] for head in range(q.shape[1])], dim=1)


def attend(core, q, k, v) -> torch.Tensor:
    return core(q, k, v, None, packed_seq_params=sample_bounds(LENGTHS))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_core_attention(heads, groups, scale):
    ours, theirs = make_qkv(heads, groups), make_qkv(heads, groups)
    output = attend(make_core(scale), *ours)
    wanted = dense_attention(*theirs, 1 / math.sqrt(HEAD_DIM) if scale is None else scale)
    assert output.shape == (TOKENS, heads * HEAD_DIM)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    output.backward(upstream)
    wanted.backward(upstream)
    for name, found, expected in zip("qkv", ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window", [1, 2, 4, 9, 100])
def test_sliding_window(window):
    """A window counts the token itself; samples that fit into it take the plain kernel."""
    ours, theirs = make_qkv(4, 2), make_qkv(4, 2)
    output = attend(make_core(window=window), *ours)
    wanted = dense_attention(*theirs, 1 / math.sqrt(HEAD_DIM), window)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    output.backward(upstream)
    wanted.backward(upstream)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)


SINKS = torch.tensor([-1.0, 0.3, 2.5, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_sinks(window, scale):
    """Attention, its gradients and those of the sinks, with the plain kernel and with a mask."""
    ours, theirs = make_qkv(4, 2), make_qkv(4, 2)
    core, sinks = make_core(scale, window, SINKS), SINKS.clone().requires_grad_()
    output = attend(core, *ours)
    wanted = dense_attention(*theirs, 1 / math.sqrt(HEAD_DIM) if scale is None else scale, window or TOKENS, sinks)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    output.backward(upstream)
    wanted.backward(upstream)
    for found, expected in zip([*ours, core.softmax_offset], [*theirs, sinks], strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)


def test_what_a_sink_takes_is_attention_to_nothing():
    """All tokens are context, and yet the mass is below 1 for each head."""
    capture, context = AttentionCapture(), make_context()
    build = core_attention_builder(lambda layer_number: make_core(sinks=SINKS), frozenset({LAYER}), capture)
    core, (q, k, v) = build(layer_number=LAYER), make_qkv(4, 2)
    masses = []
    for chosen in (context, torch.ones_like(context)):
        capture.arm(chosen)
        attend(core, q, k, v)
        masses.append(capture.take()[LAYER].double())
    probabilities = dense_probabilities(q.detach(), k.detach(), 1 / math.sqrt(HEAD_DIM), sinks=SINKS)
    torch.testing.assert_close(masses[0], (probabilities * context).sum(dim=(0, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(masses[1], probabilities.sum(dim=(0, 2)), rtol=0, atol=1e-6)
    assert (masses[1] < 3.6).all()


def test_samples_and_later_tokens_do_not_matter():
    q, k, v = make_qkv(4, 2)
    before = attend(make_core(), q, k, v)
    changed = [t.detach().clone() for t in (q, k, v)]
    for tensor in changed:
        tensor[9] += 1.0  # token 3 of the third sample (tokens 6 to 14)
    after = attend(make_core(), *changed)
    differs = (before != after).any(dim=1)
    assert differs.tolist() == [9 <= token < 15 for token in range(TOKENS)]


def test_sample_bounds():
    bounds = sample_bounds(LENGTHS)
    assert bounds.cu_seqlens_q.tolist() == bounds.cu_seqlens_kv.tolist() == [0, 5, 6, 15, 18]
    assert bounds.cu_seqlens_q.dtype == torch.int32 and bounds.qkv_format == "thd"
    assert (bounds.max_seqlen_q, bounds.max_seqlen_kv, bounds.lengths) == (9, 9, LENGTHS)


class Counted(torch.nn.Module):
    """A core attention that counts its calls, and those in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.calls_in_training = inner, 0, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.calls_in_training += self.training
        return self.inner(*args, **kwargs)


@pytest.fixture
def capturing():
    """(captured core attention of layer 3, which counts, and its capture)."""
    capture = AttentionCapture()
    build = core_attention_builder(lambda layer_number: Counted(make_core()), frozenset({LAYER}), capture)
    return build(layer_number=LAYER), capture


def make_context(seed: int = 2) -> torch.Tensor:
    return torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.5


def dense_mass(q, k, context) -> torch.Tensor:
    """Sum over heads of the attention that each token pays to context tokens, itself included if it is one."""
    probabilities = dense_probabilities(q.detach().double(), k.detach().double(), 1 / math.sqrt(HEAD_DIM))
    return (probabilities * context.double()).sum(dim=-1).sum(dim=0)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mass(capturing, heads, groups, dtype):
    core, capture = capturing
    q, k, v = make_qkv(heads, groups, dtype)
    context = make_context()
    capture.arm(context)
    attend(core, q, k, v)
    masses = capture.take()
    assert list(masses) == [LAYER]
    mass = masses[LAYER]
    assert mass.dtype == torch.float32 and mass.shape == (TOKENS,) and not mass.requires_grad
    torch.testing.assert_close(mass.double(), dense_mass(q, k, context), rtol=0, atol=1e-5)


def test_mass_of_no_context_and_of_nothing_else(capturing):
    core, capture = capturing
    q, k, v = make_qkv(4, 2)
    for context, wanted in (
        (torch.zeros(TOKENS, dtype=torch.bool), 0.0),
        (torch.ones(TOKENS, dtype=torch.bool), 4.0),
    ):
        capture.arm(context)
        attend(core, q, k, v)
        torch.testing.assert_close(capture.take()[LAYER], torch.full((TOKENS,), wanted), rtol=0, atol=1e-6)


def test_the_layers_output_and_gradients_are_unchanged(capturing):
    core, capture = capturing
    results = []
    for tried, armed in ((make_core(), False), (core, False), (core, True)):
        qkv = make_qkv(4, 2)
        if armed:
            capture.arm(make_context())
        output = attend(tried, *qkv)
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in qkv)])
    for other in results[1:]:
        assert all(torch.equal(mine, plain) for mine, plain in zip(other, results[0], strict=True))


def test_an_unarmed_capture_does_nothing(capturing):
    core, capture = capturing
    attend(core, *make_qkv(4, 2))
    assert core.calls == 1 and capture.take() == {}


def test_a_capture_fires_once_when_armed(capturing):
    core, capture = capturing
    context = make_context()
    q, k, v = make_qkv(4, 2)
    capture.arm(context)
    attend(core, q, k, v)
    attend(core, *make_qkv(4, 2, seed=9))
    assert core.calls == 3
    torch.testing.assert_close(capture.take()[LAYER].double(), dense_mass(q, k, context), rtol=0, atol=1e-5)
    attend(core, q, k, v)
    assert core.calls == 4 and capture.take() == {}, "taking disarms"
    other = make_context(seed=5)
    capture.arm(other)
    attend(core, q, k, v)
    torch.testing.assert_close(capture.take()[LAYER].double(), dense_mass(q, k, other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_capture_is_no_pass_of_training(capturing, training):
    """Transformer Engine keeps something for every one, until it is recomputed."""
    core, capture = capturing
    core.train(training)
    capture.arm(make_context())
    attend(core, *make_qkv(4, 2))
    assert (core.calls, core.calls_in_training) == (2, int(training))
    assert all(module.training == training for module in core.modules())


def test_arming_forgets_what_nobody_took(capturing):
    core, capture = capturing
    q, k, v = make_qkv(4, 2)
    capture.arm(make_context(seed=5))
    attend(core, q, k, v)
    capture.arm(make_context())
    attend(core, q, k, v)
    torch.testing.assert_close(capture.take()[LAYER].double(), dense_mass(q, k, make_context()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("taken_before_backward", [True, False])
def test_recomputation_does_not_fire_again(capturing, reentrant, taken_before_backward):
    core, capture = capturing
    plain, recomputed = make_qkv(4, 2), make_qkv(4, 2)
    attend(make_core(), *plain).square().sum().backward()
    context = make_context()
    capture.arm(context)
    output = checkpoint(lambda *qkv: attend(core, *qkv), *recomputed, use_reentrant=reentrant)
    masses = capture.take() if taken_before_backward else None
    assert core.calls == 2
    output.square().sum().backward()
    assert core.calls == 3, "the recomputation runs the layer, and does not capture again"
    masses = masses or capture.take()
    torch.testing.assert_close(masses[LAYER].double(), dense_mass(*recomputed[:2], context), rtol=0, atol=1e-5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, recomputed, strict=True))


def test_several_layers_share_a_probe():
    capture = AttentionCapture()
    config = config_of()
    build = core_attention_builder(TorchCoreAttention, frozenset({2, 4}), capture)
    cores = [build(layer_number=number, config=config) for number in (1, 2, 3, 4)]
    context = make_context()
    capture.arm(context)
    inputs = [make_qkv(4, 2, seed=number) for number in range(4)]
    for core, qkv in zip(cores, inputs, strict=True):
        attend(core, *qkv)
    masses = capture.take()
    assert sorted(masses) == [2, 4]
    for layer, mass in masses.items():
        torch.testing.assert_close(mass.double(), dense_mass(*inputs[layer - 1][:2], context), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sinks", [None, SINKS[:2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_quadratic_is_kept_for_the_backward_pass(dtype, sinks):
    tokens, heads = 256, 2
    qkv = [torch.randn(tokens, heads, HEAD_DIM, dtype=dtype).requires_grad_() for _ in range(3)]
    kept: list[int] = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        make_core(sinks=sinks)(*qkv, None, packed_seq_params=sample_bounds([tokens]))
    assert kept and max(kept) <= (tokens + 1) * heads * 2 * HEAD_DIM
