"""How the losses of the selected tokens become the loss of a global batch: averages, weights and what is divided by.

megatron divides the sum over all micro-batches and ranks by one whole number, the sum of the counts they return
(`calculate_per_token_loss`). So a mean over samples or micro-batches puts its fractions into the weights and counts
samples or micro-batches, each once; and gradients that are to be divided by a sum of weights are scaled afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.model.build import Model
from megatron_sstoken.selection.weights import Weigh, find_weight


@dataclass(frozen=True)
class LossRule:
    """What a run minimises, of the losses of its selected tokens."""

    average: str = "token"
    """`selection.loss_average`."""
    divisor: str = "selected"
    """`weights.divisor`."""
    weigh: Weigh | None = None
    """`weights.method` and `weights.alpha`; None: by the batch's own weights alone."""

    @classmethod
    def of(cls, settings: Settings) -> "LossRule":
        weights = settings.weights
        weigh = None if weights.method is None else find_weight(weights.method).at(weights.alpha)
        return cls(settings.selection.loss_average, weights.divisor, weigh)

    @property
    def scales_afterwards(self) -> bool:
        """Whether megatron divides by the number of selected tokens what is to be divided by the sum of their weights."""
        return self.average == "token" and self.divisor == "weight"


BY_TOKEN = LossRule()


def token_weights(values: Mapping[str, torch.Tensor], batch: TokenBatch, rule: LossRule) -> torch.Tensor | None:
    """How much each token counts, fp32 [T]: its own weight in the batch times what `rule` makes of the signals `values`;
    anything for tokens without a loss. None: all count alike."""
    if rule.weigh is None:
        return batch.weight
    weight = rule.weigh(values)
    return weight if batch.weight is None else weight * batch.weight


def loss_weights(
    selected: torch.Tensor, weight: torch.Tensor | None, batch: TokenBatch, rule: LossRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights fp32 [T] of the tokens of one micro-batch, zero outside `selected` (bool [T]), and what counts, bool [T].

    loss of the global batch = Σ weight · loss ÷ Σ count. `token`: `weight`, as of `token_weights`, counting the tokens of the
    divisor. `sample`: a mean per sample, counting one token of each sample of the batch. `microbatch`: a mean over the
    micro-batch, counting one token if it has a sample. A sample or micro-batch of which nothing is selected contributes 0 and
    counts.
    """
    weights = selected.float() if weight is None else torch.where(selected, weight, 0.0)
    if rule.average == "token":
        return weights, batch.response if rule.divisor == "response" else selected
    divided_by = {"selected": selected.float(), "response": batch.response.float(), "weight": weights}[rule.divisor]
    first = (batch.position == 0) & (batch.segment >= 0)
    if rule.average == "microbatch":
        total = divided_by.sum()
        return weights / torch.where(total > 0, total, 1.0), first & (batch.segment == 0)
    sizes = weights.new_zeros(batch.num_segments + 1)  # the last slot takes the padding, whose segment is −1
    sizes.index_add_(0, batch.segment % (batch.num_segments + 1), divided_by)
    return weights / torch.where(sizes > 0, sizes, 1.0)[batch.segment], first


def divide_by_weights(model: Model, sums: list[torch.Tensor]) -> None:
    """Turn gradients that are divided by the number of selected tokens into ones divided by the sum of their weights.

    `sums`: float64 [2] of each micro-batch of this rank: number and sum of weights of the selected tokens that lie here;
    empty on all but the last pipeline stage. All ranks call it.
    """
    device = next(model.chunks[0].parameters()).device
    total = torch.stack([*sums, torch.zeros(2, dtype=torch.float64, device=device)]).sum(0)
    for group in (model.layout.groups.dp_cp, model.layout.groups.pp):
        dist.all_reduce(total, group=group)
    factor = torch.where(total[1] > 0, total[0] / total[1], 1.0).float()
    for chunk in model.chunks:
        chunk.scale_gradients(factor)  # type: ignore[operator]
