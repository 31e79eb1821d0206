"""Bytes that one rank of each pipeline stage holds at its peak.

All ranks of a stage hold the same: tensor, context and data parallel split evenly. What is kept for the backward pass is
listed tensor by tensor; `tests/unit/planner` and `benchmarks/plan_check.py` compare the torch path with real models.
"""

import math
from dataclasses import asdict, dataclass, fields

from megatron_sstoken.model.head import CHUNK_ROWS
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
    """Batches with history losses, token reports, the attention capture."""
    working: int
    """Temporaries of one layer, recomputed activations included."""
    framework: int
    """CUDA, libraries and NCCL; what fragmentation loses."""

    @property
    def total(self) -> int:
        counts = ("stage", "parameters", "trainable")
        return sum(value for name, value in asdict(self).items() if name not in counts)


def parameter_sizes(w: Workload, stage: int) -> dict[str, int]:
    """Parameters of one rank of a stage, by kind: `linear` (layers' matrices), `vector`, `embedding`, `head`.

    With pipeline parallel and tied embeddings the last stage has a copy of the embedding as its head.
    """
    a, layers = w.architecture, w.chunk_layers * w.virtual_pipeline
    qkv = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim // w.tensor
    linear = a.hidden_size * (qkv + w.query_width + 3 * w.ffn_width)
    vector = 2 * a.hidden_size + (qkv if a.qkv_bias else 0) + (2 * a.head_dim if a.qk_norm else 0)
    first, last = stage == 0, stage == w.pipeline - 1
    words = w.vocabulary * a.hidden_size
    return {
        "linear": layers * linear,
        "vector": layers * vector + (a.hidden_size if last else 0),
        "embedding": words if first else 0,
        "head": words if last and not (first and a.tied_embeddings) else 0,
    }


def adapter_parameters(w: Workload) -> int:
    """LoRA parameters of one rank of any stage: A [r, in] and B [out, r] of q, k, v, o, gate, up and down.

    The side that tensor parallel does not split is whole on every rank.
    """
    a = w.architecture
    qkv = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim // w.tensor
    columns = 5 * a.hidden_size + qkv + 2 * w.ffn_width  # q, k, v, gate, up: A whole, B split
    rows = w.query_width + w.ffn_width + 2 * a.hidden_size  # o, down: A split, B whole
    return w.chunk_layers * w.virtual_pipeline * w.lora_rank * (columns + rows)


def layer_activations(w: Workload) -> dict[str, int]:
    """What one layer keeps of one micro-batch, in bytes, without recomputation of whole layers."""
    return _torch_layer(w) if w.layers_of == "torch" else _fused_layer(w)


def _torch_layer(w: Workload) -> dict[str, int]:
    """Of the torch path: every operation is one of torch's own, and keeps what its derivative needs."""
    h, split, tokens, width = w.architecture.hidden_size, w.split_tokens, w.tokens, w.width
    q, k, ffn = w.query_width, w.key_width, w.ffn_width
    grouped = q != k
    heads = q // w.architecture.head_dim
    kept = {
        # fp32 input, normalised input, output (the linear's input), 1/rms
        "norms": 2 * split * (h * (4 + 2 * width) + 4),
        # cos and sin, for queries and for keys
        "rope": 4 * tokens * w.architecture.head_dim * width,
        "mlp": tokens * 5 * ffn * width,  # gate and up together; silu(gate), up and their product apart
    }
    if w.recompute == "selective":  # inputs and output of core attention; value is a view of q, k, v together
        kept["attention"] = tokens * (q + k + (q + 2 * k) + q) * width
        return kept
    whole = tokens * w.context  # keys and values of all context parallel ranks, once for every query head
    values = q if grouped or w.context > 1 else 3 * q
    kept["attention"] = tokens * (3 * q * width + 4 * heads) + whole * (q + values) * width
    if w.context > 1:
        # Two chunks of a sample, each with its mask; one sample a pack is the worst case. SDPA keeps it as numbers.
        kept["attention_mask"] = w.micro_batch_size * (whole // w.micro_batch_size) ** 2 // (2 * w.context) * width
    return kept


def _fused_layer(w: Workload) -> dict[str, int]:
    """Of Transformer Engine: fused norm-linear, FlashAttention, fused SwiGLU. In FP8 linear inputs are one byte."""
    h, split, tokens, width = w.architecture.hidden_size, w.split_tokens, w.tokens, w.width
    q, k, ffn = w.query_width, w.key_width, w.ffn_width
    stored = 1 if w.precision == "fp8" else width
    heads = q // w.architecture.head_dim
    return {
        "norms": 2 * split * (h * (width + stored) + 4),  # input, output, 1/rms
        "attention": tokens * ((2 * q + 2 * k) * width + 4 * heads + (q if stored == 1 else 0)),
        "mlp": tokens * ffn * (2 * width + stored),
    }


def adapter_activations(w: Workload) -> int:
    """LoRA's own, per layer and micro-batch: dropped-out inputs and their masks, and the r columns between A and B."""
    if w.lora_rank == 0:
        return 0
    inputs = 2 * w.split_tokens * w.architecture.hidden_size + w.tokens * (w.query_width + w.ffn_width)
    return inputs * (w.width + 1) + 7 * w.tokens * w.lora_rank * w.width


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
    flight = chunks_in_flight(w, stage)
    if w.recompute == "full":
        chunk = w.chunk_layers * _between_layers(w)
    else:
        chunk = w.chunk_layers * (sum(layer_activations(w).values()) + adapter_activations(w))
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
    widths = 4 + 2 * w.width if w.layers_of == "torch" else 2 * w.width
    return w.split_tokens * (w.architecture.hidden_size * widths + 4)


def head_kept_bytes(w: Workload) -> int:
    """Kept by the loss for its backward pass: fp32 probabilities, targets and whether they lie elsewhere; by the selective
    head the hidden states of the scored tokens (here: of all), their targets, log-sums and places."""
    if w.head == "selective":
        return w.tokens * (w.architecture.hidden_size * w.width + 8 + 4 + 8)
    return w.tokens * (4 * w.vocabulary + 8 + 1)


def head_bytes(w: Workload) -> int:
    """The loss at its peak, on the last stage: logits, an fp32 copy, and the probabilities made of it."""
    tokens = w.tokens if w.head == "standard" else min(CHUNK_ROWS["cuda"], w.tokens)
    copies = 4 + 4 if w.precision == "fp32" else 4 + 4 + w.width
    made_of_one = 4 if w.head == "standard" else 0  # the probabilities that are kept are one of the copies
    return head_kept_bytes(w) + tokens * w.vocabulary * (copies - made_of_one)


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
        total += sum(layer_activations(w).values()) + adapter_activations(w)
    return total


def trainable_parameters(w: Workload, stage: int) -> int:
    """Parameters of one rank of a stage that have gradients."""
    return adapter_parameters(w) if w.lora_rank else sum(parameter_sizes(w, stage).values())


def stage_memory(w: Workload, stage: int, assumptions: Assumptions) -> StageMemory:
    """Everything on one rank of a stage.

    Gradients are fp32 (`grad_reduce_in_fp32`), whole on every rank. The distributed optimizer splits its state over
    data × context parallel ranks: fp32 weights and two moments, 12 bytes; 8 in fp32, where the weights serve. FP8 keeps
    bf16 weights and two FP8 copies of the layers' matrices (rows and columns).
    """
    sizes = parameter_sizes(w, stage)
    frozen = sum(sizes.values())
    trainable = trainable_parameters(w, stage)
    parameters = frozen + adapter_parameters(w)
    state = 8 if w.precision == "fp32" else 12
    parts = {
        "weights": parameters * w.width + (2 * sizes["linear"] if w.precision == "fp8" else 0),
        "gradients": trainable * 4,
        "optimizer": math.ceil(trainable / (w.data * w.context)) * state,
        "activations": activation_bytes(w, stage) + received_bytes(w, stage),
        "head": head_bytes(w) if stage == w.pipeline - 1 else 0,
        "selection": selection_bytes(w, stage),
        "working": working_bytes(w),
    }
    lost = assumptions.fragmentation * sum(parts.values())
    return StageMemory(stage, parameters, trainable, **parts, framework=int(assumptions.framework_bytes + lost))


def memory_of(w: Workload, assumptions: Assumptions) -> list[StageMemory]:
    """One entry a pipeline stage."""
    return [stage_memory(w, stage, assumptions) for stage in range(w.pipeline)]


BYTE_FIELDS = tuple(
    field.name for field in fields(StageMemory) if field.name not in ("stage", "parameters", "trainable")
)
