"""Floating-point operations of training, by the convention of published figures ("model FLOPs").

Plain full fine-tuning over real tokens: nothing that is recomputed, nothing that selection adds or saves. A look-up in the
embedding costs nothing.
"""

from megatron_sstoken.model.families import Architecture


def causal_pairs(length: float) -> float:
    """Pairs of a query and a key that it sees, in a sample of `length` tokens."""
    return length * (length + 1) / 2


def attention_flops(a: Architecture, pairs: float) -> float:
    """Forward, one layer, all heads: 2 operations for each pair and number of a key, and of a value."""
    return 2 * a.num_attention_heads * (a.head_dim + a.value_dim) * pairs


def delta_net_flops(a: Architecture, tokens: float) -> float:
    """Forward, one layer with a delta net in place of attention: every token reads the state of each head by its key, writes to
    it, and reads it by its query, with 2 operations each for every number of the state."""
    net = a.delta_net
    return 0.0 if net is None else 3 * 2 * net.value_heads * net.key_dim * net.value_dim * tokens


def model_flops(a: Architecture, tokens: float, pairs: float) -> float:
    """Forward and backward: 6 a token and weight, and three times attention and delta nets.

    The head's weights count, the embedding's do not; of a mixture those of the experts that a token meets.
    """
    weights = a.num_active_parameters() - a.vocabulary_size * a.hidden_size * (0 if a.tied_embeddings else 1)
    with_attention = len(a.attention_layers)
    mixed = with_attention * attention_flops(a, pairs) + (a.num_layers - with_attention) * delta_net_flops(a, tokens)
    return 6.0 * weights * tokens + 3 * mixed
