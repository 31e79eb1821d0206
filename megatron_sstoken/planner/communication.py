"""What one rank communicates in one training step, by kind.

Bytes are those of the whole tensor a collective works on (what it returns, or takes where it reduces); `sent_share` turns
them into bytes that leave the rank. Counts follow megatron-core's layers and schedules; `tests/unit/planner` compares
them with the calls of real models.
"""

from dataclasses import dataclass

from megatron_sstoken.gpus import GPU
from megatron_sstoken.planner.delta_nets import delta_widths
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
    micro = w.num_micro_batches
    for layers, size, runs in _gathered_samples(w, stage):
        add("context", "all_gather", 2 * layers * micro * runs, layers * micro * runs * size, w.context)
        add("context", "reduce_scatter", 2 * layers * micro, layers * micro * size, w.context)
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


def _gathered_samples(w: Workload, stage: int) -> list[tuple[int, int, int]]:
    """What layers gather of whole samples, forward, in two calls: their number, bytes of one, forward passes.

    Of attention keys and values, and once more where it is computed again; of a delta net what goes into the convolution, and
    what decides how it fades and writes.
    """
    (attention, delta), whole = w.stage_kinds[stage], w.tokens * w.context * w.width
    found = [(attention, 2 * w.key_width * whole, 1 + w.scoring_passes + (w.recompute != "none"))]
    if delta:
        net = delta_widths(w)
        again = w.recompute == "full"
        found.append((delta, (net.convolved + 2 * net.heads) * whole, 1 + w.scoring_passes + again))
    return found


def tensor_traffic(w: Workload, stage: int) -> dict[str, tuple[int, int]]:
    """Operation → (count, bytes) of a step over the tensor parallel group, the loss's own included.

    A layer has two column-parallel linears (qkv or a delta net's, fc1) and two row-parallel ones (proj, fc2). Without sequence
    parallel each pair costs an all-reduce forward (row) and backward (column). With it, all-gathers before the column linears,
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
    delta = w.stage_kinds[stage][1]
    if delta and trains_weights:  # the norm of a delta net, whose heads are dealt out
        count, size = result["all_reduce"]
        result["all_reduce"] = (count + delta * micro, size + delta * micro * delta_widths(w).norm * w.width)
    if last:  # the largest logit; sum of exponentials and target logit: fp32 a token
        count, size = result["all_reduce"]
        calls = micro * (1 + scoring)
        result["all_reduce"] = (count + 2 * calls, size + calls * 3 * 4 * w.tokens)
    return result


def _sends(w: Workload, stage: int) -> int:
    """Messages that a stage sends: activations on, gradients back; interleaved chunks wrap around."""
    chunks = w.virtual_pipeline
    onwards = chunks - (1 if stage == w.pipeline - 1 else 0)
    back = chunks - (1 if stage == 0 else 0)
    return w.num_micro_batches * (onwards * (1 + w.scoring_passes) + back)
