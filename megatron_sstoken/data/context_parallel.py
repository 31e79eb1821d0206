"""Which tokens each context parallel rank holds."""

import numpy as np
import torch


def zigzag_index(lengths: list[int], num_ranks: int) -> torch.Tensor:
    """Tokens of every rank: int64 [num_ranks, T / num_ranks], indices into the T tokens of a micro-batch.

    `lengths`: stretches that do not attend to each other, multiples of 2·num_ranks, T in all. Each is cut into
    2·num_ranks chunks, and rank r holds chunk r and chunk 2·num_ranks − 1 − r of each: causal attention then costs
    all ranks the same. The order of a rank's tokens is Transformer Engine's and megatron's RoPE's for packed samples.
    """
    assert all(length % (2 * num_ranks) == 0 for length in lengths), (lengths, num_ranks)
    starts = np.cumsum([0, *lengths[:-1]])
    parts: list[list[np.ndarray]] = [[] for _ in range(num_ranks)]
    for start, length in zip(starts.tolist(), lengths, strict=True):
        size = length // (2 * num_ranks)
        for rank, part in enumerate(parts):
            for chunk in (rank, 2 * num_ranks - 1 - rank):
                part.append(np.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.from_numpy(np.stack([np.concatenate(part) for part in parts]))
