"""The gated delta rule by chunks against a plain recurrence over tokens, and against transformers, forward and backward."""

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn, torch_chunk_gated_delta_rule

from megatron_sstoken.model import delta_rule
from megatron_sstoken.model.delta_rule import gated_delta_rule, short_convolution

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 5, 3
LENGTHS = {
    "one token": [1],
    "short": [3, 1, 7],
    "a whole chunk": [64],
    "chunks of some": [130, 5, 64, 65],
    "long last": [2, 193],
}


def drawn(num_tokens, *, dtype=torch.float64, decay=1.0, seed=0):
    """Query, key, value, decay and strength of random tokens, to be differentiated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(num_tokens, *shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(KEY_HEADS, KEY_DIM), draw(KEY_HEADS, KEY_DIM), draw(VALUE_HEADS, VALUE_DIM)
    fade, strength = -decay * draw(VALUE_HEADS).exp(), draw(VALUE_HEADS).sigmoid()
    return [one.to(dtype).requires_grad_() for one in (query, key, value, fade, strength)]


def recurrence(query, key, value, decay, strength, lengths):
    """Token after token, head after head, as the rule is written."""
    served = value.shape[1] // key.shape[1]
    query, key = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (query, key))
    outputs = []
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        states = [torch.zeros(KEY_DIM, VALUE_DIM, dtype=value.dtype) for _ in range(VALUE_HEADS)]
        for t in range(start, start + length):
            for head in range(VALUE_HEADS):
                q, k = query[t, head // served], key[t, head // served]
                state = states[head] * decay[t, head].exp()
                states[head] = state + strength[t, head] * torch.outer(k, value[t, head] - k @ state)
                outputs.append(q @ states[head] / KEY_DIM**0.5)
    return torch.stack(outputs).unflatten(0, (-1, VALUE_HEADS))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward_and_gradients_are_those_of_the_recurrence(lengths):
    inputs = drawn(sum(lengths))
    found, wanted = gated_delta_rule(*inputs, lengths), recurrence(*inputs, lengths)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(one, inputs, upstream) for one in (found, wanted))
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(delta_rule, "CHUNK", 2)
    delta_rule._chunks.cache_clear()
    assert torch.autograd.gradcheck(lambda *inputs: gated_delta_rule(*inputs, [3, 2]), drawn(5))
    delta_rule._chunks.cache_clear()


@pytest.mark.parametrize("decay", [1e-3, 1.0, 300.0])
def test_each_sample_is_computed_as_transformers_computes_it(decay):
    """In fp32; also where a state hardly fades, and where nothing is left of it after a token."""
    lengths = [70, 9, 128]
    inputs = drawn(sum(lengths), dtype=torch.float32, decay=decay)
    found = gated_delta_rule(*inputs, lengths)
    parts = zip(*(one.split(lengths) for one in inputs), strict=True)
    wanted = [
        torch_chunk_gated_delta_rule(*(one[None] for one in part), use_qk_l2norm_in_kernel=True)[0][0] for part in parts
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(one).all() for one in torch.autograd.grad(found.sum(), inputs))


def test_the_kernel_of_a_gpu_is_asked_as_it_wants(monkeypatch):
    """One batch, a query and a key for every value head, bounds of samples; stood in for by the recurrence."""

    def kernel(query, key, value, decay, strength, *, cu_seqlens, use_qk_l2norm_in_kernel):
        assert query.shape == key.shape == (1, 9, VALUE_HEADS, KEY_DIM) and value.shape == (
            1,
            9,
            VALUE_HEADS,
            VALUE_DIM,
        )
        assert cu_seqlens.tolist() == [0, 4, 9] and use_qk_l2norm_in_kernel
        inputs = (one.squeeze(0) for one in (query, key, value, decay, strength))
        return recurrence(*inputs, cu_seqlens.diff().tolist()).unsqueeze(0), None

    inputs = drawn(9)
    wanted = gated_delta_rule(*inputs, [4, 5])
    monkeypatch.setattr(delta_rule, "_kernel", lambda device, dtype: kernel)
    torch.testing.assert_close(gated_delta_rule(*inputs, [4, 5]), wanted)


def test_no_kernel_is_taken_where_there_is_none():
    choose = delta_rule._kernel.__wrapped__
    assert choose("cpu", torch.bfloat16) is None and choose("cuda", torch.float32) is None


def test_padding_behind_a_sample_changes_nothing():
    inputs = drawn(12)
    short = gated_delta_rule(*(torch.cat([one[:5], one[8:]]) for one in inputs), [5, 4])
    padded = gated_delta_rule(*inputs, [8, 4])
    torch.testing.assert_close(torch.cat([padded[:5], padded[8:]]), short)
    gradients = torch.autograd.grad(padded[:5].sum() + padded[8:].sum(), inputs)
    assert all(not one[5:8].any() and one[:5].any() for one in gradients)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 9], [5, 5]])
def test_the_convolution_of_each_sample_is_transformers(lengths, kernel):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(lengths), 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    found = short_convolution(inputs, weight, lengths)
    wanted = torch.cat(
        [causal_conv1d_fn(one.t()[None], weight.squeeze(1), activation="silu")[0].t() for one in inputs.split(lengths)]
    )
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(one, (inputs, weight), upstream) for one in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
