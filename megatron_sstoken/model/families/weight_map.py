"""Which Hugging Face tensors make which megatron parameter: the rules that families share.

A family whose tensors differ puts its own list together from these and others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from megatron_sstoken.model.families.architecture import Architecture, DeltaNet, Latents


class Split(Enum):
    """How a megatron parameter is made from Hugging Face tensors and split over the tensor parallel group."""

    WHOLE = "whole"  # the same on all ranks
    ROWS = "rows"  # consecutive output rows (column-parallel linear)
    COLUMNS = "columns"  # consecutive input columns (row-parallel linear)
    QKV = "qkv"  # q, k, v interleaved by query group, then rows
    KEY_HEADS = "key heads"  # parts interleaved by key head of a delta net, then rows
    GATED = "gated"  # on each rank its rows of the gate, then its rows of the up projection
    VOCABULARY = "vocabulary"  # rows, zeros appended to the padded vocabulary


@dataclass(frozen=True)
class WeightRule:
    """One megatron parameter, `{layer}` standing for the layer's number, and the Hugging Face tensors it is made of.

    A weight of an expert (`expert`: its number in the model) is whole on the ranks that hold the expert: expert parallel
    deals experts out, and tensor parallel does not cut them.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    expert: int | None = None
    fused: bool = False
    """Whether one Hugging Face tensor holds the parts (q, k and v, or gate and up) one after another by rows."""
    blocks: tuple[tuple[int, ...], ...] = ()
    """Of parts that are interleaved by key head: for each Hugging Face tensor the rows that a head has of each of the parts
    that lie in it one after another."""
    only: tuple[int, ...] | None = None
    """The layers (from 0) that have it; None: all."""
    stacked: bool = False
    """Whether the Hugging Face tensor holds all experts, along its first axis: matrices [inputs, outputs], in which outputs of
    gate and up take turns, and biases alike."""

    @property
    def part(self) -> int | None:
        """Which part of the Hugging Face tensor it is, along the first axis; None: all of it."""
        return self.expert if self.stacked else None

    def layers(self, architecture: Architecture) -> tuple[int, ...]:
        """The layers that have it; 0 for what lies outside of layers."""
        if "{layer}" not in self.megatron:
            return (0,)
        return tuple(range(architecture.num_layers)) if self.only is None else self.only


MlpRules = Callable[[Architecture], list[WeightRule]]
"""The rules of an architecture's feed-forward part."""

LAYER = "decoder.layers.{layer}."
HF = "model.layers.{layer}."
"""How the names of a layer begin, megatron's and Hugging Face's."""

_QKV = WeightRule(
    LAYER + "self_attention.linear_qkv.weight", tuple(HF + f"self_attn.{name}_proj.weight" for name in "qkv"), Split.QKV
)
_OUTPUT = WeightRule(LAYER + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight",), Split.COLUMNS)
_NORMS = {
    "before_attention": "input_layernorm",
    "after_attention": "self_attn_bda.norm",
    "before_mlp": "pre_mlp_layernorm",
    "after_mlp": "mlp_bda.norm",
}
"""Field of `LayerNorms` → where megatron's layer has the norm (`model/residual.py`)."""
_QK_NORMS = tuple(
    WeightRule(LAYER + f"self_attention.{name}_layernorm.weight", (HF + f"self_attn.{name}_norm.weight",), Split.WHOLE)
    for name in "qk"
)
_SINKS = WeightRule(LAYER + "self_attention.core_attention.softmax_offset", (HF + "self_attn.sinks",), Split.ROWS)
_LATENTS = tuple(
    WeightRule(LAYER + f"self_attention.{megatron}.weight", (HF + f"self_attn.{name}.weight",), split)
    for megatron, name, split in (
        ("linear_q_down_proj", "q_a_proj", Split.WHOLE),
        ("q_layernorm", "q_a_layernorm", Split.WHOLE),
        ("linear_q_up_proj", "q_b_proj", Split.ROWS),
        ("linear_q_proj", "q_proj", Split.ROWS),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa", Split.WHOLE),
        ("kv_layernorm", "kv_a_layernorm", Split.WHOLE),
        ("linear_kv_up_proj", "kv_b_proj", Split.ROWS),
    )
)
_EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Split.VOCABULARY)
_FINAL_NORM = WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Split.WHOLE)
_HEAD = WeightRule("output_layer.weight", ("lm_head.weight",), Split.VOCABULARY)

LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")
"""Gate, up and down projection as Llama calls them."""


def gated_mlp(megatron: str, hugging_face: str, names: tuple[str, str, str], expert: int | None) -> list[WeightRule]:
    """Gate, up and down projection, in this order of Hugging Face `names`."""
    gate, up, down = (f"{hugging_face}{name}.weight" for name in names)
    return [
        WeightRule(megatron + "linear_fc1.weight", (gate, up), Split.GATED, expert),
        WeightRule(megatron + "linear_fc2.weight", (down,), Split.COLUMNS, expert),
    ]


def fuse(rules: list[WeightRule], suffix: str, module: str) -> list[WeightRule]:
    """`rules`, those for megatron parameters that end so with their tensors fused in the Hugging Face linear `module`."""
    return [
        replace(rule, hugging_face=(_sibling(rule.hugging_face[0], module),), fused=True)
        if rule.megatron.endswith((f"{suffix}.weight", f"{suffix}.bias"))
        else rule
        for rule in rules
    ]


def _sibling(name: str, module: str) -> str:
    """The name of a tensor of the linear `module` beside that of tensor `name`."""
    parent, _, kind = name.rsplit(".", 2)
    return f"{parent}.{module}.{kind}"


def dense_mlp(architecture: Architecture) -> list[WeightRule]:
    """One feed-forward part, as in Llama."""
    rules = gated_mlp(LAYER + "mlp.", HF + "mlp.", LLAMA_NAMES, expert=None)
    return rules + [_bias_of(rule) for rule in rules] if architecture.mlp_bias else rules


def _bias_of(weight: WeightRule) -> WeightRule:
    """The rule of the bias beside a weight: split as its rows are, whole where the weight is split by columns."""
    names = (name.replace(".weight", ".bias") for name in (weight.megatron, *weight.hugging_face))
    split = Split.WHOLE if weight.split is Split.COLUMNS else weight.split
    return WeightRule(next(names), tuple(names), split, weight.expert)


def mixture(block: str, names: tuple[str, str, str], shared: str = "shared_experts") -> MlpRules:
    """Router and experts under the Hugging Face module `block`, and `shared` in it, which every token meets."""

    def rules(architecture: Architecture) -> list[WeightRule]:
        found = [WeightRule(LAYER + "mlp.router.weight", (f"{HF}{block}.gate.weight",), Split.WHOLE)]
        for expert in range(architecture.num_experts):
            megatron = f"{LAYER}mlp.experts.local_experts.{expert}."
            found += gated_mlp(megatron, f"{HF}{block}.experts.{expert}.", names, expert)
        if architecture.router_bias:
            bias = (f"{HF}{block}.gate.e_score_correction_bias",)
            found.append(WeightRule(LAYER + "mlp.router.expert_bias", bias, Split.WHOLE))
        if architecture.shared_ffn_hidden_size:
            found += gated_mlp(f"{LAYER}mlp.shared_experts.", f"{HF}{block}.{shared}.", names, expert=None)
        if architecture.shared_gate:
            gate = (f"{HF}{block}.{shared}_gate.weight",)
            found.append(WeightRule(LAYER + "mlp.shared_experts.gate_weight", gate, Split.WHOLE))
        if not architecture.dense_layers:
            return found
        dense = gated_mlp(LAYER + "mlp.", f"{HF}{block}.", names, expert=None)
        return in_layers(architecture.dense_layers, dense) + in_layers(architecture.sparse_layers, found)

    return rules


def stacked_experts(architecture: Architecture) -> list[WeightRule]:
    """Router and experts with biases, tensors of all experts, as in GPT-OSS."""
    router = WeightRule(LAYER + "mlp.router.weight", (HF + "mlp.router.weight",), Split.WHOLE)
    rules = [router, _bias_of(router)]
    for expert in range(architecture.num_experts):
        for linear, name, split in (
            ("linear_fc1", "gate_up_proj", Split.GATED),
            ("linear_fc2", "down_proj", Split.COLUMNS),
        ):
            megatron, stack = f"{LAYER}mlp.experts.local_experts.{expert}.{linear}", f"{HF}mlp.experts.{name}"
            weight = WeightRule(f"{megatron}.weight", (stack,), split, expert, stacked=True)
            of_bias = Split.WHOLE if split is Split.COLUMNS else split
            bias = replace(weight, megatron=f"{megatron}.bias", hugging_face=(f"{stack}_bias",), split=of_bias)
            rules += [weight, bias]
    return rules


def latent_attention(latents: Latents) -> list[WeightRule]:
    """What makes queries, keys and values of latents, as megatron calls it in its own multi-head latent attention."""
    absent = {"q_a_proj", "q_a_layernorm", "q_b_proj"} if latents.query is None else {"q_proj"}
    return [rule for rule in _LATENTS if rule.hugging_face[0].split(".")[-2] not in absent]


def in_layers(layers: tuple[int, ...], rules: list[WeightRule]) -> list[WeightRule]:
    """The rules, of parameters that only these layers (from 0) have."""
    return [replace(rule, only=layers) for rule in rules] if layers else []


def delta_net(net: DeltaNet, *, by_head: bool) -> list[WeightRule]:
    """What stands in place of attention.

    Two or four linears make `DeltaNet.blocks` of hidden states: `by_head` all of them for one key head after another, as they
    are needed here; else each for all heads before the next.
    """
    megatron, hugging_face = LAYER + "self_attention.", HF + "linear_attn."
    names: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    if by_head:
        names, blocks = ("qkvz", "ba"), ((sum(net.blocks[:4]),), (sum(net.blocks[4:]),))
    else:
        names, blocks = ("qkv", "z", "b", "a"), (net.blocks[:3], *((block,) for block in net.blocks[3:]))
    tensors = tuple(f"{hugging_face}in_proj_{name}.weight" for name in names)
    convolution = (hugging_face + "conv1d.weight",)
    return [
        WeightRule(megatron + "in_proj.weight", tensors, Split.KEY_HEADS, blocks=blocks),
        WeightRule(megatron + "conv_weight", convolution, Split.KEY_HEADS, blocks=(net.blocks[:3],)),
        WeightRule(megatron + "dt_bias", (hugging_face + "dt_bias",), Split.ROWS),
        WeightRule(megatron + "A_log", (hugging_face + "A_log",), Split.ROWS),
        WeightRule(megatron + "out_norm.weight", (hugging_face + "norm.weight",), Split.WHOLE),
        WeightRule(megatron + "out_proj.weight", (hugging_face + "out_proj.weight",), Split.COLUMNS),
    ]


def decoder_rules(
    architecture: Architecture, mlp: MlpRules = dense_mlp, *, delta_by_head: bool = False
) -> list[WeightRule]:
    """The rules of a decoder with Llama's names: attention or delta nets, feed-forward part, embedding, final norm and head."""
    rules = [
        WeightRule(f"{LAYER}{megatron}.weight", (f"{HF}{name}.weight",), Split.WHOLE)
        for field, megatron in _NORMS.items()
        if (name := getattr(architecture.norms, field))
    ]
    attention = [_QKV, _OUTPUT] if architecture.latents is None else [*latent_attention(architecture.latents), _OUTPUT]
    if architecture.qkv_bias:
        attention.append(_bias_of(_QKV))
    if architecture.output_bias:
        attention.append(_bias_of(_OUTPUT))
    if architecture.qk_norm:
        attention += _QK_NORMS
    if architecture.attention_sinks:
        attention.append(_SINKS)
    if architecture.delta_net is not None:
        attention = in_layers(architecture.attention_layers, attention)
        without = tuple(n for n in range(architecture.num_layers) if n not in architecture.attention_layers)
        attention += in_layers(without, delta_net(architecture.delta_net, by_head=delta_by_head))
    rules += attention
    rules += mlp(architecture)
    rules += [_EMBEDDING, _FINAL_NORM]
    if not architecture.tied_embeddings:
        rules.append(_HEAD)
    return rules
