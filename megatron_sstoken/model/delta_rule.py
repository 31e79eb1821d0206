"""The gated delta rule (arXiv 2412.06464) and the short convolution before it, of packed samples.

Every head keeps a state S, a matrix that answers keys with values. Each token lets it fade, corrects by a share β what it
answers to the token's key k, and asks it with the token's query q:

    S ← exp(g)·S;  S ← S + β·k (v − kᵀS);  output = qᵀS / √(numbers of a key)

Chunks of tokens are computed at once, as in transformers (`torch_chunk_gated_delta_rule`): within a chunk all corrections
follow from one triangular system, and only the state goes from chunk to chunk. State and convolution start anew with each
sample. The rule is computed in fp32 (in float64 where its inputs are).
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens that are computed at once."""
_EPSILON = 1e-6
"""Of the lengths that queries and keys are divided by."""


@dataclass(frozen=True)
class Chunks:
    """How samples are cut into chunks, the last of each filled up. Chunks stand in the order of computation: the first of all
    samples, the second of those that have one, and so on, long samples first."""

    places: torch.Tensor
    """int64 [tokens]: where each token lies among the rows of all chunks."""
    steps: tuple[int, ...]
    """How many chunks are computed at once, step by step; never more than before."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Chunks":
        """The chunks of samples of these lengths, which lie one after another."""
        return _chunks(tuple(lengths), device)


@functools.lru_cache(maxsize=4)  # every layer asks for the same
def _chunks(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    tokens_of = torch.tensor(lengths)
    chunks_of = -(-tokens_of // CHUNK)
    rank = torch.empty_like(chunks_of)
    rank[chunks_of.argsort(descending=True, stable=True)] = torch.arange(len(lengths))
    steps = [int((chunks_of > step).sum()) for step in range(int(chunks_of.max()))]
    first = torch.tensor([0, *steps]).cumsum(0)
    sample = _sample_of_tokens(lengths, torch.device("cpu"))
    position = torch.arange(len(sample)) - (tokens_of.cumsum(0) - tokens_of)[sample]
    places = (first[position // CHUNK] + rank[sample]) * CHUNK + position % CHUNK
    return Chunks(places.to(device), tuple(steps))


@functools.lru_cache(maxsize=4)
def _sample_of_tokens(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [tokens]: the number of each token's sample."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """What the states answer: [tokens, value heads, value dim], of the type of `value`.

    Query and key [tokens, key heads, key dim], which get length 1 here; value [tokens, value heads, value dim]; `decay` g and
    `strength` β [tokens, value heads]. Each key head serves as many value heads, which follow one another. `lengths`: tokens
    of the samples, one after another.
    """
    served = value.shape[1] // key.shape[1]
    if served > 1:
        query, key = query.repeat_interleave(served, dim=1), key.repeat_interleave(served, dim=1)
    if (kernel := _kernel(value.device.type, value.dtype)) is not None:
        inputs = (one.unsqueeze(0) for one in (query, key, value, decay, strength))
        bounds = _bounds(tuple(lengths), value.device)
        return kernel(*inputs, cu_seqlens=bounds, use_qk_l2norm_in_kernel=True)[0].squeeze(0)
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key, values, decay, strength = (one.to(wide) for one in (query, key, value, decay, strength))
    query = _of_length_one(query) * query.shape[-1] ** -0.5
    answers = _answers(query, _of_length_one(key), values, decay, strength, Chunks.of(lengths, value.device))
    return answers.to(value.dtype)


@functools.lru_cache(maxsize=4)
def _kernel(device_type: str, dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, None]] | None:
    """flash-linear-attention's kernel for packed samples, on a GPU where it is installed; None elsewhere, and for fp32, which
    it does not take."""
    if device_type != "cuda" or dtype is torch.float32 or importlib.util.find_spec("fla") is None:
        return None
    return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule


@functools.lru_cache(maxsize=4)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [samples + 1]: where samples begin, and the last ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def _of_length_one(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + _EPSILON)


def _answers(query, key, value, decay, strength, chunks: Chunks) -> torch.Tensor:
    """The rule by chunks; inputs of one type, a query and a key for every value head. Names of shapes: N chunks, H heads."""
    number = sum(chunks.steps)

    def cut(rows: torch.Tensor) -> torch.Tensor:  # [tokens, H, …] → [N, H, CHUNK, …], zeros where a chunk is filled up
        filled = rows.new_zeros(number * CHUNK, *rows.shape[1:]).index_copy(0, chunks.places, rows)
        return filled.unflatten(0, (number, CHUNK)).transpose(1, 2)

    query, key, value, decay, strength = (cut(rows) for rows in (query, key, value, decay, strength))
    faded = decay.cumsum(-1)  # since the chunk's beginning, as a logarithm
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = (faded.unsqueeze(-1) - faded.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    strong = key * strength.unsqueeze(-1)
    # What each token writes, as far as the chunk's own tokens decide, and how the state before the chunk changes that.
    system, width = (strong @ key.mT) * between, value.shape[-1]
    right = torch.cat([value * strength.unsqueeze(-1), strong * faded.exp().unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    within = (query @ key.mT) * between
    asked = query * faded.exp().unsqueeze(-1)
    kept = key * (faded[..., -1:] - faded).exp().unsqueeze(-1)  # until the chunk's end
    fade = faded[..., -1].exp()[..., None, None]

    state = value.new_zeros(chunks.steps[0], *key.shape[1:2], key.shape[-1], width)
    answers = []
    parts = (one.split(chunks.steps) for one in (solved, within, asked, kept, fade))
    for solved_now, within_now, asked_now, kept_now, fade_now in zip(*parts, strict=True):
        state = state[: len(fade_now)]  # samples that end before have no chunk here
        written, read = solved_now.split([width, key.shape[-1]], dim=-1)
        written = written - read @ state
        answers.append(asked_now @ state + within_now @ written)
        state = state * fade_now + kept_now.mT @ written
    return torch.cat(answers).transpose(1, 2).flatten(0, 1).index_select(0, chunks.places)


def short_convolution(inputs: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """SiLU of a weighted sum of each channel's last numbers within its sample: [tokens, channels] → the same.

    `weight` [channels, 1, kernel], the token's own number last; before a sample are zeros. `lengths` as in
    `gated_delta_rule`.
    """
    before, sample = weight.shape[-1] - 1, _sample_of_tokens(tuple(lengths), inputs.device)
    places = torch.arange(len(sample), device=inputs.device) + before * sample  # as many zeros before each sample
    apart = inputs.new_zeros(len(inputs) + before * len(lengths), inputs.shape[1])
    apart = apart.index_copy(0, places + before, inputs)
    summed = F.conv1d(apart.t().unsqueeze(0), weight, groups=inputs.shape[1]).squeeze(0)
    return F.silu(summed.t().index_select(0, places))
