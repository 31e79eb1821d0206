"""How the losses of the selected tokens become the loss of a global batch (`selection.loss_average`).

megatron divides the sum over all micro-batches and ranks by one whole number, the sum of the counts they return
(`calculate_per_token_loss`). So a mean over samples or micro-batches puts its fractions into the weights and counts
samples or micro-batches, each once.
"""

import torch

from megatron_sstoken.data.batches import TokenBatch


def loss_weights(selected: torch.Tensor, batch: TokenBatch, average: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights fp32 [T] of the tokens of one micro-batch, zero outside `selected` (bool [T]), and the count, int [].

    loss of the global batch = Σ weight · loss ÷ Σ count. `token`: 1 each, counting selected tokens. `sample`: a mean
    per sample, counting the samples of the batch. `microbatch`: a mean over the micro-batch, counting it if it has a
    sample. A sample or micro-batch of which nothing is selected contributes 0 and counts.
    """
    weights = selected.float()
    if average == "token":
        return weights, selected.sum(dtype=torch.int)
    if average == "microbatch":
        count = torch.full((), int(batch.num_segments > 0), dtype=torch.int, device=selected.device)
        return weights / weights.sum().clamp(min=1), count
    sizes = weights.new_zeros(batch.num_segments + 1)  # the last slot takes the padding, whose segment is −1
    sizes.index_add_(0, batch.segment % (batch.num_segments + 1), weights)
    weights = weights / sizes.clamp(min=1)[batch.segment]
    return weights, torch.full((), batch.num_segments, dtype=torch.int, device=selected.device)
