"""Bytes that one rank of each pipeline stage holds at its peak.

All ranks of a stage hold the same: tensor, context and data parallel split evenly. What is kept for the backward pass is
listed tensor by tensor; `tests/unit/planner` and `benchmarks/plan_check.py` compare the torch path with real models.
"""

import math
from dataclasses import dataclass, fields

from megatron_sstoken.checkpoint.size import COPY_BYTES
from megatron_sstoken.model.head import CHUNK_ROWS
from megatron_sstoken.planner.delta_nets import delta_net_bytes, delta_widths, mixed_bytes
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.workload import Workload

BATCH_BYTES = 5 * 8 + 2 + 4
"""Of a token on its way: tokens, labels, position, segment and sample (int64), two roles (bool), history loss (fp32)."""
REPORT_BYTES = 5 * 4 + 1
"""Of a token on the last stage until the step ends: loss, attention, score, rel_norm, weight (fp32), selected (bool)."""


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage. `parameters` and `trainable` are counts, all else bytes."""

    stage: int
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward passes of all micro-batches in flight."""
    head: int
    """Logits and what the loss makes of them, at its peak."""
    selection: int
    """Batches with history losses, token reports, the attention capture, the copy of the weights of a history that moves."""
    working: int
    """Temporaries of one layer, recomputed activations included."""
    update: int
    """Temporaries of the optimizer's step, or the weights that a copy has taken the place of, as far as they are more than
    what the backward pass has given back."""
    framework: int
    """CUDA, libraries and NCCL; what fragmentation loses."""
    host: int = 0
    """In the memory of the node's processors, not on the GPU."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, name) for name in BYTE_FIELDS)


def parameter_sizes(w: Workload, stage: int) -> dict[str, int]:
    """Parameters of one rank of a stage, by kind: `linear` (layers' matrices), `vector`, `embedding`, `head`.

    With pipeline parallel and tied embeddings the last stage has a copy of the embedding as its head.
    """
    a, (attention, delta) = w.architecture, w.stage_kinds[stage]
    qkv = (a.query_rows + 2 * a.num_query_groups * a.head_dim) // w.tensor
    linear = (attention + delta) * 3 * a.hidden_size * w.ffn_width + attention * a.hidden_size * (qkv + w.query_width)
    vector = attention * (a.norm_parameters() + (qkv if a.qkv_bias else 0) + (a.hidden_size if a.output_bias else 0))
    vector += (attention + delta) * (2 * w.ffn_width + a.hidden_size if a.mlp_bias else 0)
    if delta:
        net = delta_widths(w)
        linear += delta * a.hidden_size * (net.made + net.values)
        vector += delta * (a.norms.number * a.hidden_size + net.vectors)
    first, last = stage == 0, stage == w.pipeline - 1
    words = w.vocabulary * a.hidden_size
    return {
        "linear": linear,
        "vector": vector + (a.hidden_size if last else 0),
        "embedding": words if first else 0,
        "head": words if last and not (first and a.tied_embeddings) else 0,
    }


def adapter_parameters(w: Workload, stage: int) -> int:
    """LoRA parameters of one rank of a stage: A [r, in] and B [out, r] of all linears of its layers.

    The side that tensor parallel does not split is whole on every rank.
    """
    a, (attention, delta) = w.architecture, w.stage_kinds[stage]
    qkv = (a.query_rows + 2 * a.num_query_groups * a.head_dim) // w.tensor
    # Of q, k, v, gate and up A is whole and B split, of o and down A split and B whole.
    sides = (attention + delta) * 3 * (a.hidden_size + w.ffn_width)
    sides += attention * (4 * a.hidden_size + qkv + w.query_width)
    if delta:
        net = delta_widths(w)
        sides += delta * ((net.linears + 1) * a.hidden_size + net.made + net.values)
    return sides * w.lora_rank


def layer_activations(w: Workload, *, delta: bool = False) -> dict[str, int]:
    """What one layer keeps of one micro-batch, in bytes, without recomputation of whole layers; `delta`: one with a delta
    net in place of attention."""
    kept = _torch_layer(w) if w.layers_of == "torch" else _fused_layer(w)
    if delta:
        kept = {name: kept[name] for name in ("norms", "mlp")} | {"delta net": delta_net_bytes(w)}
    return kept


def _kept(w: Workload, *, delta: bool) -> int:
    """What one layer keeps with its adapters."""
    return sum(layer_activations(w, delta=delta).values()) + adapter_activations(w, delta=delta)


def largest_kept(w: Workload) -> int:
    """The same of the layer that keeps most."""
    kinds = {delta for chunks in w.chunk_kinds for numbers in chunks for delta, number in enumerate(numbers) if number}
    return max(_kept(w, delta=bool(delta)) for delta in kinds)


def _torch_layer(w: Workload) -> dict[str, int]:
    """Of the torch path: every operation is one of torch's own, and keeps what its derivative needs."""
    h, split, tokens, width = w.architecture.hidden_size, w.split_tokens, w.tokens, w.width
    q, k, ffn = w.query_width, w.key_width, w.ffn_width
    grouped, gated = q != k, w.architecture.output_gate
    heads = q // w.architecture.head_dim
    kept = {
        # the norm's own, and its output (the linear's input)
        "norms": 2 * split * (h * width + _norm_bytes(w, h)),
        # cos and sin, for queries and for keys
        "rope": 4 * tokens * w.architecture.rotary_dim * width,
        "mlp": tokens * 5 * ffn * width,  # gate and up together; silu(gate), up and their product apart
    }
    if gated:  # its sigmoid in fp32, and what attention gives
        kept["gate"] = tokens * q * (4 + width)
    if w.architecture.qk_norm:
        dim = w.architecture.head_dim
        kept["qk_norms"] = tokens * (q + k) // dim * _norm_bytes(w, dim)
    if w.recompute == "selective":  # inputs and output of core attention; value is a view of q, k, v together
        kept["attention"] = tokens * (q + k + (k if gated else q + 2 * k) + q) * width
        return kept
    whole = tokens * w.context  # keys and values of all context parallel ranks, once for every query head
    values = q if grouped or gated or w.context > 1 else 3 * q
    kept["attention"] = tokens * (3 * q * width + 4 * heads) + whole * (q + values) * width
    if w.context > 1:
        # Two chunks of a sample, each with its mask; one sample a pack is the worst case. SDPA keeps it as numbers.
        kept["attention_mask"] = w.micro_batch_size * (whole // w.micro_batch_size) ** 2 // (2 * w.context) * width
    return kept


def _norm_bytes(w: Workload, numbers: int) -> int:
    """Kept by torch's norm of one row, its output apart: fp32 input, normalised input, 1/rms."""
    return numbers * (4 + (4 if w.architecture.zero_centered_norms else w.width)) + 4


def _fused_layer(w: Workload) -> dict[str, int]:
    """Of Transformer Engine: fused norm-linear, FlashAttention, fused SwiGLU. In FP8 linear inputs are one byte."""
    h, split, tokens, width = w.architecture.hidden_size, w.split_tokens, w.tokens, w.width
    q, k, ffn = w.query_width, w.key_width, w.ffn_width
    stored = 1 if w.precision == "fp8" else width
    heads = q // w.architecture.head_dim
    # Of the gate its sigmoid; the linear's input.
    gate = q * (4 + (width if stored == width else 0)) if w.architecture.output_gate else 0
    norms = (q + k) * width if w.architecture.qk_norm else 0
    return {
        "norms": 2 * split * (h * (width + stored) + 4),  # input, output, 1/rms
        "attention": tokens * ((2 * q + 2 * k) * width + 4 * heads + (q if stored == 1 else 0) + gate + norms),
        "mlp": tokens * ffn * (2 * width + stored),
    }


def adapter_activations(w: Workload, *, delta: bool = False) -> int:
    """LoRA's own, per layer (one with a delta net if `delta`) and micro-batch: dropped-out inputs and their masks, and the r
    columns between A and B."""
    if w.lora_rank == 0:
        return 0
    net = delta_widths(w) if delta else None
    mixed, linears = (net.values, net.linears + 4) if net else (w.query_width, 7)
    inputs = 2 * w.split_tokens * w.architecture.hidden_size + w.tokens * (mixed + w.ffn_width)
    return inputs * (w.width + 1) + linears * w.tokens * w.lora_rank * w.width


def chunks_in_flight(w: Workload, stage: int) -> int:
    """(Micro-batch, model chunk) pairs whose backward pass is still to come, at most.

    megatron's schedules: 1F1B runs pipeline − stage − 1 forward passes ahead, the interleaved one twice as many and
    pipeline for every further chunk.
    """
    if w.virtual_pipeline == 1:
        return min(w.pipeline - stage, w.num_micro_batches)
    ahead = 2 * (w.pipeline - stage - 1) + (w.virtual_pipeline - 1) * w.pipeline
    return min(ahead + 1, w.num_micro_batches * w.virtual_pipeline)


def activation_bytes(w: Workload, stage: int) -> int:
    """What autograd keeps for backward passes on one rank of a stage, at most; without the loss (`head_kept_bytes`)."""
    flight, layers = chunks_in_flight(w, stage), w.chunk_layers(stage)
    if w.offload_layers:  # one layer's on the way there and one's on the way back
        layers = min(layers, layers - w.offload_layers + 2)
    if w.recompute == "full":
        chunk = layers * _between_layers(w)
    elif w.offload_layers:
        chunk = layers * largest_kept(w)
    else:  # of chunks that differ, the fullest
        chunk = max(
            attention * _kept(w, delta=False) + (delta * _kept(w, delta=True) if delta else 0)
            for attention, delta in w.chunk_kinds[stage]
        )
    total = flight * chunk
    if stage == 0:
        total += _first_chunks(w) * w.tokens * 8  # the embedding's indices
    if stage == w.pipeline - 1:
        total += final_norm_bytes(w)
    return total


def received_bytes(w: Workload, stage: int) -> int:
    """Inputs from the stage before, which live until their backward pass; where the first norm keeps them, nothing."""
    if w.layers_of != "torch" or w.precision == "fp32" or w.recompute == "full":
        return 0
    own = _first_chunks(w) if stage == 0 else 0
    return (chunks_in_flight(w, stage) - own) * _between_layers(w)


def _between_layers(w: Workload) -> int:
    return w.split_tokens * w.architecture.hidden_size * w.width


def _first_chunks(w: Workload) -> int:
    """Of the chunks in flight on stage 0, those of the first layers."""
    return min(chunks_in_flight(w, 0), w.num_micro_batches, 2 * w.pipeline if w.virtual_pipeline > 1 else w.pipeline)


def final_norm_bytes(w: Workload) -> int:
    """Kept by the norm before the head for one micro-batch."""
    h = w.architecture.hidden_size
    own = _norm_bytes(w, h) if w.layers_of == "torch" else h * w.width + 4
    return w.split_tokens * (h * w.width + own)


def head_kept_bytes(w: Workload) -> int:
    """Kept by the loss for its backward pass: fp32 probabilities, targets and whether they lie elsewhere; by the selective
    head the hidden states of the scored tokens (here: of all), their targets, log-sums and places."""
    if w.head == "selective":
        return w.tokens * (w.architecture.hidden_size * w.width + 8 + 4 + 8)
    return w.tokens * (4 * w.vocabulary + 8 + 1)


def head_bytes(w: Workload) -> int:
    """The loss at its peak, on the last stage: logits, an fp32 copy, and the probabilities made of it.

    The selective head sums its weight's gradient in fp32: in megatron's buffer, or where that is bf16 apart.
    """
    tokens = w.tokens if w.head == "standard" else min(CHUNK_ROWS["cuda"], w.tokens)
    copies = 4 + 4 if w.precision == "fp32" else 4 + 4 + w.width
    made_of_one = 4 if w.head == "standard" else 0  # the probabilities that are kept are one of the copies
    trains_head = not w.lora_rank or "lm_head" in w.train_whole
    apart = w.head == "selective" and w.gradient_dtype == "bf16" and trains_head
    summed = w.vocabulary * w.architecture.hidden_size * (4 + w.width) if apart else 0
    return head_kept_bytes(w) + tokens * w.vocabulary * (copies - made_of_one) + summed


def selection_bytes(w: Workload, stage: int) -> int:
    """Batches on the device for a whole step, reports on the last stage, and the attention capture's second attention there."""
    total = w.num_micro_batches * w.pack_tokens * BATCH_BYTES
    if stage == w.pipeline - 1:
        total += w.num_micro_batches * w.pack_tokens * REPORT_BYTES
        if w.selects:
            repeated = 2 * w.context * w.query_width if w.layers_of == "torch" else 0
            total += w.tokens * (w.key_width + w.query_width + repeated) * w.width
    return total


def working_bytes(w: Workload) -> int:
    """Temporaries of one layer's backward pass: gradients of its widest tensors, gathered inputs; its activations
    where they are recomputed. An estimate."""
    h, width = w.architecture.hidden_size, w.width
    total = w.tokens * (3 * w.ffn_width + 2 * h) * width
    if w.recompute == "full":
        total += largest_kept(w)
    elif w.recompute == "selective" and w.architecture.delta_net is not None:
        total += mixed_bytes(w)
    return total


def trainable_parameters(w: Workload, stage: int) -> int:
    """Parameters of one rank of a stage that have gradients."""
    sizes = parameter_sizes(w, stage)
    if not w.lora_rank:
        return sum(sizes.values())
    tables = {"embed_tokens": "embedding", "lm_head": "head"}
    return adapter_parameters(w, stage) + sum(sizes[tables[module]] for module in w.train_whole)


def state_bytes(w: Workload) -> int:
    """Optimizer state of one parameter on the GPU: fp32 weight and two moments; fp32 weights serve themselves."""
    return sum(w.moment_widths) + (0 if w.precision == "fp32" else 4)


def optimizer_bytes(w: Workload, shard: int) -> int:
    """State on the GPU of the `shard` parameters that a rank updates. Beside what is offloaded megatron keeps gradients in fp32
    of the rest."""
    if w.offload_fraction:
        return math.ceil(shard * (1 - w.offload_fraction)) * (state_bytes(w) + 4)
    return shard * state_bytes(w)


def host_bytes(w: Workload, stage: int) -> int:
    """What one rank of a stage keeps in the host's memory: state with gradients in fp32, activations."""
    shard = math.ceil(trainable_parameters(w, stage) / (w.data * w.context))
    activations = w.offload_layers * largest_kept(w) if w.offload_layers else 0
    return math.ceil(shard * w.offload_fraction) * (state_bytes(w) + 4) + activations


def update_bytes(w: Workload, shard: int) -> int:
    """Temporaries of the optimizer's step: gradients in fp32 where they are bf16, and moments in fp32 where they are not."""
    if w.offload_fraction:
        return 0
    if w.moment_widths != (4, 4):  # Transformer Engine's AdamW reads gradients as they are
        return shard * 4 * sum(width != 4 for width in w.moment_widths)
    return shard * 4 if w.gradient_dtype == "bf16" else 0


def stage_memory(w: Workload, stage: int, assumptions: Assumptions) -> StageMemory:
    """Everything on one rank of a stage.

    Gradients are whole on every rank. The distributed optimizer splits its state over data × context parallel ranks, and so
    is the copy of a history that moves. FP8 keeps bf16 weights and two FP8 copies of the layers' matrices (rows and columns).
    The optimizer's step needs its memory when the backward pass has given back activations and logits.
    """
    sizes = parameter_sizes(w, stage)
    frozen = sum(sizes.values())
    trainable = trainable_parameters(w, stage)
    parameters = frozen + adapter_parameters(w, stage)
    shard = math.ceil(trainable / (w.data * w.context))
    parts = {
        "weights": parameters * w.width + (2 * sizes["linear"] if w.precision == "fp8" else 0),
        "gradients": trainable * w.gradient_width,
        "optimizer": optimizer_bytes(w, shard),
        "activations": activation_bytes(w, stage) + received_bytes(w, stage),
        "head": head_bytes(w) if stage == w.pipeline - 1 else 0,
        "selection": selection_bytes(w, stage) + (COPY_BYTES * shard if w.copies_weights else 0),
        "working": working_bytes(w),
    }
    given_back = parts["activations"] + parts["head"] + parts["working"]
    saved = shard * w.width if w.copies_weights else 0
    parts["update"] = max(max(update_bytes(w, shard), saved) - given_back, 0)
    lost = assumptions.fragmentation * sum(parts.values())
    return StageMemory(
        stage,
        parameters,
        trainable,
        **parts,
        framework=int(assumptions.framework_bytes + lost),
        host=host_bytes(w, stage),
    )


def memory_of(w: Workload, assumptions: Assumptions) -> list[StageMemory]:
    """One entry a pipeline stage."""
    return [stage_memory(w, stage, assumptions) for stage in range(w.pipeline)]


BYTE_FIELDS = tuple(
    field.name for field in fields(StageMemory) if field.name not in ("stage", "parameters", "trainable", "host")
)
"""What lies on the GPU."""
