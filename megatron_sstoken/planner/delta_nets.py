"""What gated delta nets hold, keep and compute, as torch does it (`model/delta_net.py`, `model/delta_rule.py`).

flash-linear-attention, where it is installed, keeps less: its states are computed again.
"""

from dataclasses import dataclass

from megatron_sstoken.config.model import LINEARS
from megatron_sstoken.model.delta_rule import CHUNK
from megatron_sstoken.model.lora_places import adapter_places
from megatron_sstoken.planner.workload import Workload


@dataclass(frozen=True)
class DeltaWidths:
    """Numbers of a delta net on one tensor parallel rank, of each token where nothing else is said."""

    heads: int
    """Value heads."""
    convolved: int
    values: int
    made: int
    """By the linear that goes in."""
    linears: int
    """Those in folders that it is made of."""
    vectors: int
    """Parameters of convolution, decay and norm."""
    norm: int
    """Parameters of the norm alone, which all ranks hold."""
    rule: int
    """What the rule keeps of each token and value head: fp32."""
    rule_flops: int
    """Of it forward, for each token and value head."""


def delta_widths(w: Workload) -> DeltaWidths:
    """Those of the architecture, which has delta nets."""
    net = w.architecture.delta_net
    assert net is not None
    heads, convolved, k, v = net.value_heads // w.tensor, net.convolved // w.tensor, net.key_dim, net.value_dim
    return DeltaWidths(
        heads=heads,
        convolved=convolved,
        values=net.values // w.tensor,
        made=net.key_heads * sum(net.blocks) // w.tensor,
        linears=sum(place.linear.endswith(".in_proj") for place in adapter_places(w.architecture, LINEARS)),
        vectors=convolved * net.kernel + 2 * heads + v,
        norm=v,
        # Of a chunk's tokens five matrices with one another; of each chunk a state.
        rule=14 * k + 4 * v + k * v // CHUNK + 5 * CHUNK + 8,
        # Three products with the state; in a chunk keys with keys and queries, the triangular system, what is read.
        rule_flops=2 * 3 * k * v + CHUNK * (2 * 2 * k + (k + v) + 2 * v),
    )


def mixed_bytes(w: Workload) -> int:
    """What convolution and rule of one layer keep, or where they are computed again, need then. Every context parallel rank
    computes whole samples."""
    net, whole, width = delta_widths(w), w.tokens * w.context, w.width
    # Three times what is convolved, places (int64); strength, two of decay; the rule, in whole chunks.
    kept = whole * (3 * net.convolved * width + 16 + net.heads * (width + 8))
    sample = w.pack_tokens // w.micro_batch_size
    return kept + w.micro_batch_size * -(-sample // CHUNK) * CHUNK * net.heads * 4 * net.rule


def delta_net_bytes(w: Workload) -> int:
    """What a delta net keeps, whatever makes its linears."""
    net, tokens, width = delta_widths(w), w.tokens, w.width
    stored = 1 if w.precision == "fp8" else width
    # Of the norm in the end: its fp32 input, 1/rms, normalised, weighted, the gate and its SiLU in fp32; the linear's input.
    kept = tokens * (net.values * (4 + width + 4 + 4 + width + stored) + 4 * net.heads)
    if w.recompute != "selective":
        return kept + mixed_bytes(w)
    # What goes into the convolution: gathered, or with all else that the same linear makes.
    inputs = tokens * net.made if w.context == 1 else tokens * w.context * (net.convolved + 2 * net.heads)
    return kept + inputs * width
