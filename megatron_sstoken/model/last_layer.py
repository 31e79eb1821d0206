"""The last transformer layer, whose MLP needs only the rows that the selective head reads.

After its attention nothing mixes tokens any more: the MLP, its norm and residual, the final norm and the head work row by
row. Rows of tokens without a loss can be left out, forward and backward; the others' losses and gradients are the same.
"""

from megatron.core.transformer.transformer_layer import TransformerLayer


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
