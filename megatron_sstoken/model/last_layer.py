"""The last transformer layer, whose MLP needs only the rows that the selective head reads.

After its attention nothing mixes tokens any more: the MLP, its norm and residual, the final norm and the head work row by
row. Rows of tokens without a loss can be left out, forward and backward; the others' losses and gradients are the same.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sstoken.model.head import IGNORE_INDEX


@dataclass(frozen=True)
class HeadRows:
    """Which of a rank's rows of hidden states the head reads."""

    padded: torch.Tensor
    """int64 [m]: those rows, then repetitions of row 0 where another tensor rank has more."""
    number: int
    """How many are not repetitions."""


def head_rows(labels: torch.Tensor, sequence_ranks: int, sequence_rank: int) -> HeadRows:
    """The rows of labelled tokens among those that this rank holds between layers.

    `labels`: int64 [tokens of this context parallel rank], alike on all tensor ranks. Sequence parallel deals them out evenly
    to `sequence_ranks` (1 without it), whose collectives want equally many rows of each: as many as the fullest has, and one
    at least.
    """
    scored = (labels != IGNORE_INDEX).view(sequence_ranks, -1)
    own = scored[sequence_rank].nonzero().squeeze(1)
    most = max(int(scored.sum(1).max()), 1)
    padded = torch.zeros(most, dtype=torch.int64, device=labels.device)
    padded[: len(own)] = own
    return HeadRows(padded, len(own))


class LastLayer(TransformerLayer):
    """megatron's layer; its MLP leaves out rows that `packed_seq_params.head_rows` does not name.

    The rows left out keep what came out of attention: finite numbers that nobody reads. The rows come with the micro-batch's
    bounds because that is the one argument of our own that megatron hands through its model, its block and activation
    recompute to every layer.
    """

    def forward(self, *args, packed_seq_params=None, **kwargs):
        hidden_states, context = self._forward_attention(*args, packed_seq_params=packed_seq_params, **kwargs)
        rows = packed_seq_params.head_rows
        if rows is None:
            return self._forward_mlp(hidden_states), context
        output = self._forward_mlp(hidden_states.index_select(0, rows.padded))
        # index_copy would keep `output` for its backward pass.
        return hidden_states.index_put((rows.padded[: rows.number],), output[: rows.number]), context
