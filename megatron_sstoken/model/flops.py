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


def model_flops(a: Architecture, tokens: float, pairs: float) -> float:
    """Forward and backward: 6 a token and weight, and three times the attention.

    The head's weights count, the embedding's do not; of a mixture those of the experts that a token meets.
    """
    weights = a.num_active_parameters() - a.vocabulary_size * a.hidden_size * (0 if a.tied_embeddings else 1)
    return 6.0 * weights * tokens + 3 * a.num_layers * attention_flops(a, pairs)
