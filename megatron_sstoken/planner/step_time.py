"""Expected step time from FLOPs, bytes and rates; every share that is assumed is a field of `Assumptions`.

Not modelled: launch gaps, load imbalance of packed samples (packs count as one causal sample), validation, saving.
"""

from dataclasses import dataclass

from megatron_sstoken.gpus import GPU
from megatron_sstoken.model.flops import attention_flops, causal_pairs, model_flops
from megatron_sstoken.planner.communication import Traffic, traffic_of
from megatron_sstoken.planner.delta_nets import delta_widths
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import largest_kept, parameter_sizes, state_bytes, trainable_parameters
from megatron_sstoken.planner.workload import Workload

FLASH_BACKWARD = 2.5
"""FLOPs of FlashAttention's backward pass, as a multiple of its forward: it computes the scores again."""
LOGIT_BYTES = 54
"""Memory traffic of one logit through the loss and back (fp32 copy, maximum, exponential, sum, gradient)."""
HOST_BYTES = 28
"""Memory traffic of AdamW for one parameter in the host's memory: gradient 4, weight and moments 12 read and 12 written."""


@dataclass(frozen=True)
class Speed:
    """One training step, in seconds, and what follows from it."""

    compute: float
    """The busiest stage, all micro-batches: matrix products, attention, element-wise work."""
    tensor: float
    """Its exposed tensor parallel communication."""
    context: float
    pipeline: float
    """Messages between stages."""
    bubble: float
    """Waiting of the pipeline to fill and drain."""
    data: float
    """Gradients and weights between replicas, as far as no computation hides them."""
    optimizer: float
    """The update, on the GPU or in the host's memory, whichever takes longer."""
    offload: float
    """Activations on their way to the host's memory and back, as far as no computation hides them."""
    tokens: int
    """Of a global batch."""
    model_flops: float
    """Of a global batch; see model/flops.py."""
    world_size: int

    @property
    def step(self) -> float:
        busy = self.compute + self.tensor + self.context + self.pipeline + self.bubble
        return busy + self.offload + self.data + self.optimizer

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens a second."""
        return self.tokens / self.step / self.world_size

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP a second."""
        return self.model_flops / self.step / self.world_size / 1e12


def stage_seconds(w: Workload, stage: int, gpu: GPU, assumptions: Assumptions) -> float:
    """Computation of one micro-batch on one rank of a stage, forward and backward."""
    layers, (with_attention, delta) = w.stage_layers[stage], w.stage_kinds[stage]
    scoring = w.scoring_passes
    forward = 1 + scoring + (w.recompute == "full")
    backward = 1 if w.lora_rank else 2  # frozen matrices have no gradient of their own
    peak = {"fp32": gpu.fp32, "bf16": gpu.bf16, "fp8": gpu.fp8}[w.precision]
    rate = peak * (assumptions.matmul_fp8 if w.precision == "fp8" else assumptions.matmul)
    linear = 2 * w.tokens * parameter_sizes(w, stage)["linear"] * (forward + backward) / rate
    attention_rate = (gpu.fp32 if w.precision == "fp32" else gpu.bf16) * assumptions.attention
    passes = with_attention * (1 + scoring + (w.recompute != "none") + FLASH_BACKWARD)
    last = stage == w.pipeline - 1
    if last and w.selects:
        passes += 1  # the attention capture, where it usually lies
    pairs = w.tokens * causal_pairs(w.sequence_length) / w.sequence_length
    attention = attention_flops(w.architecture, pairs) / w.tensor * passes / attention_rate
    elementwise = layers * layer_bytes(w) * (forward + 2) / (gpu.memory_bandwidth * assumptions.memory)
    rules = delta * _rule_seconds(w, gpu, assumptions) if delta else 0
    return linear + attention + rules + elementwise + (_head_seconds(w, gpu, assumptions) if last else 0)


def _rule_seconds(w: Workload, gpu: GPU, assumptions: Assumptions) -> float:
    """The rule of one delta net, in fp32, backward twice as much as forward; what it keeps is written and read again."""
    net = delta_widths(w)
    whole = w.tokens * w.context * net.heads  # every context parallel rank computes all tokens
    work = 1 + w.scoring_passes + (w.recompute != "none") + 2
    products = whole * net.rule_flops * work / (gpu.fp32 * assumptions.matmul)
    return products + 2 * whole * 4 * net.rule * work / (gpu.memory_bandwidth * assumptions.memory)


def layer_bytes(w: Workload) -> float:
    """Memory traffic of one layer's element-wise work, forward: norms, residuals, RoPE, SwiGLU; backward is twice it."""
    norms = 10 * w.split_tokens * w.architecture.hidden_size
    fused = (norms + 2 * w.tokens * (w.query_width + w.key_width) + 3 * w.tokens * w.ffn_width) * w.width
    return fused * (1 if w.layers_of == "transformer_engine" else 3)  # unfused: each operation reads and writes


def _head_seconds(w: Workload, gpu: GPU, assumptions: Assumptions) -> float:
    """The head is no FP8 layer. Shares of the tokens whose logits are computed: once forward, three products to train."""
    logits = w.tokens * w.vocabulary
    work, passes = 3.0 + w.scoring_passes, 1.0 + w.scoring_passes / 2
    if w.head == "selective":
        trained = w.response * w.rho if w.selects else w.response
        scored = w.response * (1 + w.history_passes)  # a pass that scores for the selection spares another its own
        work, passes = scored + 3 * trained, (scored + trained) / 2
    rate = (gpu.fp32 if w.precision == "fp32" else gpu.bf16) * assumptions.matmul
    products = 2 * logits * w.architecture.hidden_size * work / rate
    return products + passes * logits * LOGIT_BYTES / (gpu.memory_bandwidth * assumptions.memory)


def transfer_seconds(traffic: Traffic, gpu: GPU, assumptions: Assumptions) -> float:
    """A ring collective's time on its slowest link."""
    rate = gpu.nvlink if traffic.link == "nvlink" else gpu.network
    return traffic.sent / (rate * assumptions.links)


def update_seconds(w: Workload, gpu: GPU, assumptions: Assumptions) -> float:
    """The optimizer's step on the fullest rank.

    AdamW passes once over gradient, weight and state; all gradients are emptied, and their norm taken. What lies in the
    host's memory is updated there beside the rest, parameter by parameter while gradients (fp32) come and weights go.
    """
    parameters = max(trainable_parameters(w, stage) for stage in range(w.pipeline))
    shard = parameters / (w.data * w.context)
    bf16_weight = 0 if w.precision == "fp32" else 2
    update = (1 - w.offload_fraction) * shard * (w.gradient_width + 2 * state_bytes(w) + bf16_weight)
    on_gpu = (update + 2 * w.gradient_width * parameters) / (gpu.memory_bandwidth * assumptions.memory)
    moved = shard * w.offload_fraction * 4 / (gpu.host_link * assumptions.links)
    on_host = shard * w.offload_fraction * HOST_BYTES / (gpu.host_memory * assumptions.host)
    return max(on_gpu, moved, on_host)


def offload_seconds(w: Workload, seconds: float, gpu: GPU, assumptions: Assumptions) -> float:
    """What is left to wait for of the activations that move to the host's memory, forward, and back, backward, in a step.

    `seconds`: the computation of one micro-batch, of which the offloaded layers' share hides their transfers.
    """
    if not w.offload_layers:
        return 0.0
    moved = w.offload_layers * largest_kept(w) / (gpu.host_link * assumptions.links)
    hidden = seconds * w.offload_layers / w.architecture.num_layers
    return w.num_micro_batches * (max(moved - hidden / 3, 0.0) + max(moved - hidden * 2 / 3, 0.0))


def speed_of(w: Workload, gpu: GPU, assumptions: Assumptions) -> Speed:
    """One training step.

    The busiest stage works through all micro-batches; the pipeline fills and drains through all stages once, in chunks.
    Gradients are reduced beside the last backward pass (`overlap_grad_reduce`), weights gathered beside the first forward pass
    (`overlap_param_gather`; not with adapters). Context parallel transfers hide behind attention in Transformer Engine, not in
    the torch path.
    """
    micro = w.num_micro_batches
    stages = []
    for stage in range(w.pipeline):
        seconds = {"compute": stage_seconds(w, stage, gpu, assumptions) * micro}
        for traffic in traffic_of(w, stage, gpu):
            name = traffic.kind if traffic.kind != "data" else f"data {traffic.operation}"
            seconds[name] = seconds.get(name, 0.0) + transfer_seconds(traffic, gpu, assumptions)
        seconds["tensor"] = seconds.get("tensor", 0.0) * assumptions.tensor_exposed
        exposed = 1.0 if w.layers_of == "torch" else assumptions.context_exposed
        seconds["context"] = seconds.get("context", 0.0) * exposed
        stages.append(seconds)
    busy = [sum(one[kind] for kind in ("compute", "tensor", "context")) for one in stages]
    worst = max(range(w.pipeline), key=busy.__getitem__)
    slow = stages[worst]
    bubble = (sum(busy) - busy[worst]) / micro / w.virtual_pipeline
    one = busy[worst] / micro  # a third of it is the forward pass, which hides gathers, the rest hides reductions
    gathered = slow.get("data all_gather", 0.0) - (0.0 if w.lora_rank else one / 3)
    reduced = slow.get("data reduce_scatter", 0.0) - one * 2 / 3
    return Speed(
        compute=slow["compute"],
        tensor=slow["tensor"],
        context=slow["context"],
        pipeline=slow.get("pipeline", 0.0),
        bubble=bubble,
        data=max(reduced, 0.0) + max(gathered, 0.0),
        optimizer=update_seconds(w, gpu, assumptions),
        offload=offload_seconds(w, one, gpu, assumptions),
        tokens=w.global_batch_size * w.sequence_length,
        model_flops=w.global_batch_size
        * model_flops(w.architecture, w.sequence_length, causal_pairs(w.sequence_length)),
        world_size=w.world_size,
    )
