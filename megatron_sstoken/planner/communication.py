"""What one rank communicates in one training step, by kind.

Bytes are those of the whole tensor a collective works on (what it returns, or takes where it reduces); `sent_share` turns
them into bytes that leave the rank. Counts follow megatron-core's layers and schedules; `tests/unit/planner` compares
them with the calls of real models.
"""

from dataclasses import dataclass

from megatron_sstoken.gpus import GPU
from megatron_sstoken.planner.memory import trainable_parameters
from megatron_sstoken.planner.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """One kind of collective of one rank, over a step."""

    kind: str
    """tensor, context, pipeline, data or selection."""
    operation: str
    count: int
    size: int
    """Bytes of all of them together."""
    group: int
    """Ranks that take part."""
    link: str
    """nvlink, if the group fits a node, or network."""

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, by ring algorithms."""
        shares = {"all_reduce": 2 * (self.group - 1) / self.group, "send": 1.0}
        return self.size * shares.get(self.operation, (self.group - 1) / self.group)


def link_of(w: Workload, gpu: GPU, kind: str) -> str:
    """The slowest link inside a group. Ranks are numbered tensor first, then context, data and pipeline."""
    spans = {"tensor": w.tensor, "context": w.tensor * w.context, "data": w.tensor * w.context * w.data}
    span = spans.get(kind, w.world_size)
    return "nvlink" if span <= gpu.gpus_per_node else "network"


def traffic_of(w: Workload, stage: int, gpu: GPU) -> list[Traffic]:
    """All that one rank of a stage communicates in a step."""
    found: list[Traffic] = []

    def add(kind: str, operation: str, count: int, size: int, group: int) -> None:
        if group > 1 and count:
            found.append(Traffic(kind, operation, count, size, group, link_of(w, gpu, kind)))

    for operation, (count, size) in tensor_traffic(w, stage).items():
        add("tensor", operation, count, size, w.tensor)
    layers, micro = w.stage_layers[stage], w.num_micro_batches
    keys = 2 * w.tokens * w.context * w.key_width * w.width  # keys and values of a whole sample
    runs = _forward_runs(w)
    add("context", "all_gather", 2 * layers * micro * runs, layers * micro * runs * keys, w.context)
    add("context", "reduce_scatter", 2 * layers * micro, layers * micro * keys, w.context)
    sends = _sends(w, stage)
    add("pipeline", "send", sends, sends * w.split_tokens * w.architecture.hidden_size * w.width, w.pipeline)
    trained, shards = trainable_parameters(w, stage), w.data * w.context
    add("data", "reduce_scatter", w.virtual_pipeline, trained * w.gradient_width, shards)
    # A copy of the weights takes their place for a pass, and goes. Gathered beside the pass that reads them, neither is
    # gathered in vain; adapters are at once.
    gathers = 1 + (w.copies_weights and (2 if w.lora_rank else 1))
    add("data", "all_gather", gathers * w.virtual_pipeline, gathers * trained * w.width, shards)
    if stage == w.pipeline - 1:
        known = 2 if w.selects else 1  # losses, attention: fp32 a token
        add("selection", "all_gather", micro, known * micro * w.pack_tokens * 4, w.context)
        if w.selects:
            add("selection", "all_reduce", micro, micro * w.tokens * 4, w.tensor)  # attention over heads
    return found


def tensor_traffic(w: Workload, stage: int) -> dict[str, tuple[int, int]]:
    """Operation → (count, bytes) of a step over the tensor parallel group, the loss's own included.

    A layer has two column-parallel linears (qkv, fc1) and two row-parallel ones (proj, fc2). Without sequence parallel
    each pair costs an all-reduce forward (row) and backward (column). With it, all-gathers before the column linears,
    again in backward for the weight's gradient, and before the row linears' backward; reduce-scatters at the other ends.
    Recomputing whole layers repeats the forward part. Of the selective head all tokens are counted, scored or not.
    """
    layers, micro = w.stage_layers[stage], w.num_micro_batches
    hidden = w.tokens * w.architecture.hidden_size * w.width
    again = w.recompute == "full"
    scoring = w.scoring_passes
    first, last = stage == 0, stage == w.pipeline - 1
    trains_weights, selective = w.lora_rank == 0, w.head == "selective"
    counts = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    if w.sequence:
        forward = 2 * (1 + again + scoring)
        counts["all_gather"] += layers * (forward + 2 + (2 if trains_weights else 0))
        counts["reduce_scatter"] += layers * (forward + 2)
        if first:
            counts["reduce_scatter"] += 1 + scoring
            counts["all_gather"] += 1 if trains_weights else 0
        if last and selective:  # gathers the hidden states once; their gradient comes out whole on every rank
            counts["all_gather"] += 1 + scoring
            counts["all_reduce"] += 1
        elif last:
            counts["all_gather"] += 1 + scoring + (1 if trains_weights else 0)
            counts["reduce_scatter"] += 1
    else:
        counts["all_reduce"] += layers * 2 * (2 + again + scoring)
        counts["all_reduce"] += (1 + scoring) * first + last
    result = {name: (count * micro, count * micro * hidden) for name, count in counts.items()}
    if last:  # the largest logit; sum of exponentials and target logit: fp32 a token
        count, size = result["all_reduce"]
        calls = micro * (1 + scoring)
        result["all_reduce"] = (count + 2 * calls, size + calls * 3 * 4 * w.tokens)
    return result


def _forward_runs(w: Workload) -> int:
    """Forward passes of a layer's attention in a step, recomputed ones included."""
    return 1 + w.scoring_passes + (w.recompute != "none")


def _sends(w: Workload, stage: int) -> int:
    """Messages that a stage sends: activations on, gradients back; interleaved chunks wrap around."""
    chunks = w.virtual_pipeline
    onwards = chunks - (1 if stage == w.pipeline - 1 else 0)
    back = chunks - (1 if stage == 0 else 0)
    return w.num_micro_batches * (onwards * (1 + w.scoring_passes) + back)
