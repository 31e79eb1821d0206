"""Per-token loss over a vocabulary that is split over the tensor parallel group.

`selective_head` goes from hidden states to losses and computes logits only where they matter (`model.head=selective`).
`vocabulary_parallel_loss` takes the logits of every token, from megatron's own output layer (`model.head=standard`).
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sstoken.model.rows import HeadRows
from megatron_sstoken.selection.signals import TOP_WORDS
from megatron_sstoken.selection.topk import indices_where

IGNORE_INDEX = -100
"""Label of positions whose loss nobody wants: torch's `ignore_index`."""

CHUNK_ROWS = {"cpu": 416, "cuda": 1024}
"""Tokens whose logits are held at once, at most. c of them cost 4·c·hidden·vocabulary operations for gradients and
8·hidden·vocabulary bytes to read and write the summed gradient of the weight, so that c must be above twice the machine's
operations a byte (about 20 for a core, 300 for an H100); and MKL's products are a sixth slower for 256 rows than for 1,024."""


@dataclass(frozen=True)
class HeadOptions:
    """How a model's head computes."""

    vocabulary_size: int
    """Without padding."""
    selective: bool = True
    """Whether losses come from `selective_head`, else from megatron's output layer."""
    signals: tuple[str, ...] = ()
    """What the selective head tells beside the loss, of `PREDICTION_SIGNALS`."""
    compiled: bool = False
    """Whether the selective head's elementwise steps are compiled."""
    logits_divisor: float = 1.0
    """What hidden states are divided by before the vocabulary head, and logits with them."""

    @property
    def told(self) -> tuple[str, ...]:
        """What the rows are that the head returns."""
        return ("loss", *self.signals) if self.selective else ("loss",)


def vocabulary_parallel_loss(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """−log softmax(logits)[target] for every token, in nats.

    `logits`: [..., padded vocabulary / group size], this rank's consecutive columns, any float dtype; they are not
    changed (megatron's own version overwrites them). `targets`: int64 [...], the same on all ranks of `group`.
    Columns from `vocabulary_size` on are padding: they get no probability and no gradient. Returns fp32 [...], the
    same on all ranks; every rank of `group` must call it.
    """
    return _VocabularyParallelLoss.apply(logits, targets, vocabulary_size, group)


class _VocabularyParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocabulary_size, group):
        width = logits.shape[-1]
        first = group.rank() * width
        num_real = min(max(vocabulary_size - first, 0), width)
        wide = logits.float()
        if num_real < width:
            wide = torch.where(torch.arange(width, device=logits.device) < num_real, wide, -torch.inf)
        largest = wide.max(dim=-1).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = wide - largest.unsqueeze(-1)

        local = targets - first
        elsewhere = (local < 0) | (local >= width)
        local = local.masked_fill(elsewhere, 0)
        target_logit = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp_()
        totals = torch.stack([exponentials.sum(-1), target_logit])
        dist.all_reduce(totals, group=group)
        sum_exponentials, target_logit = totals

        ctx.save_for_backward(exponentials.div_(sum_exponentials.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits.dtype
        return sum_exponentials.log() - target_logit

    @staticmethod
    def backward(ctx, loss_gradient):
        probabilities, local, elsewhere = ctx.saved_tensors
        gradient = probabilities * loss_gradient.unsqueeze(-1)
        at_target = torch.where(elsewhere, 0.0, -loss_gradient).unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), at_target)
        return gradient.to(ctx.dtype), None, None, None


def selective_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary_size: int,
    group: dist.ProcessGroup,
    *,
    rows: HeadRows | None = None,
    signals: tuple[str, ...] = (),
    compiled: bool = False,
) -> torch.Tensor:
    """Loss of the labelled tokens straight from hidden states, computing only what is asked for.

    `hidden`: [tokens, hidden size], whole and the same on all ranks of `group`; `weight`: [padded vocabulary / group
    size, hidden size], this rank's consecutive rows; `labels`: int64 [tokens], the same on all ranks, `IGNORE_INDEX` where
    no loss is wanted. Returns fp32 [1 + signals, tokens], NaN where not scored: the losses in nats and, without gradient,
    the `signals`, of `PREDICTION_SIGNALS`. Every rank of `group` must call it, forward and backward; how many collectives
    run depends on the signals alone.

    The forward pass computes the logits of scored tokens, the backward pass those of tokens whose loss has a gradient that
    is not exactly zero, both chunk by chunk: no logits are kept. So a loss function that multiplies the losses by a mask
    selects what the backward pass costs. With n of T tokens scored and k trained on, the products are n + 3k rows of
    2·hidden·vocabulary operations, where logits for all take 3T. The gradient of `hidden` is complete on every rank; that
    of `weight` is summed in fp32, into its `main_grad` where megatron's DDP has made one.

    `compiled`: what is done to a chunk of logits between the products runs as one kernel made by torch.compile, which in
    bf16 reads the logits once or twice where the plain version reads and writes them half a dozen times.

    `rows`: where the labels are and, before the backward pass, how many losses get a gradient, where the host knows it; else
    the host waits for the device to tell.
    """
    where = indices_where(labels != IGNORE_INDEX, None) if rows is None else rows.scored
    scored = _SelectiveHead.apply(
        hidden.index_select(0, where),
        weight,
        labels.index_select(0, where),
        vocabulary_size,
        group,
        rows,
        signals,
        compiled,
    )
    everywhere = scored.new_full((scored.shape[0], labels.shape[0]), torch.nan)
    return everywhere.index_copy(1, where, scored)


class _SelectiveHead(torch.autograd.Function):
    """hidden [n, h], weight [w, h], labels [n] → fp32 [1 + signals, n]. p = exp(logit − largest) / total, over all ranks."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, vocabulary_size, group, known_rows, signals, compiled):
        real = _real_rows(weight, vocabulary_size, group)
        local, elsewhere = _local_labels(labels, weight, group)
        # A rank that holds padding only has no logits: a largest one below all others, and nothing to add.
        largest = torch.full_like(labels, -1e30, dtype=torch.float32)
        sums = torch.zeros(2 + len(_further_sums(signals)), len(labels), device=labels.device)
        words = min(TOP_WORDS, vocabulary_size) if "entropy_top20" in signals else 0
        top = torch.full((len(labels), words), -torch.inf, device=labels.device)
        measure = _compiled(_statistics) if compiled else _statistics
        for rows in _chunks(len(labels), len(real), labels.device):
            # One expression: the logits of a chunk are gone before the next one's are made.
            found = measure(hidden[rows] @ real.t(), local[rows], signals, min(words, len(real)))
            largest[rows], sums[:, rows], top[rows, : found[2].shape[1]] = found
        largest, sums = _combine(largest, sums, signals, elsewhere, group)
        total, target = sums[0], sums[1]
        ctx.save_for_backward(hidden, weight, local, elsewhere, largest, total)
        ctx.vocabulary_size, ctx.group, ctx.known_rows, ctx.compiled = vocabulary_size, group, known_rows, compiled
        # Taken now: megatron's own linear layer does so, because a saved weight may come back without its attributes.
        ctx.main_grad = getattr(weight, "main_grad", None)
        return torch.stack([total.log() - target, *_predictions(signals, sums, _top_of_all(top, group))])

    @staticmethod
    def backward(ctx, gradients):
        hidden, weight, local, elsewhere, largest, total = ctx.saved_tensors
        real = _real_rows(weight, ctx.vocabulary_size, ctx.group)
        gradient = gradients[0]
        number = ctx.known_rows.num_trained if ctx.known_rows is not None else None
        trained = gradient != 0
        if number is not None:
            # There may be fewer, where a weight is 0 or a threshold selects: others take their places, and change nothing.
            trained |= ~trained & ((~trained).cumsum(0) <= number - trained.sum())
        trained = indices_where(trained, number)
        parts = hidden.new_zeros(len(trained), hidden.shape[1])
        summed = _weight_sum(weight, ctx.main_grad) if ctx.needs_input_grad[1] else None
        differentiate = _compiled(_logit_gradients) if ctx.compiled else _logit_gradients
        for rows in _chunks(len(trained), len(real), hidden.device):
            index = trained[rows]
            inputs, upstream, columns = hidden[index], gradient[index], local[index].unsqueeze(1)
            own_upstream = torch.where(elsewhere[index], 0.0, upstream)
            products, at_target = differentiate(
                inputs @ real.t(), columns, largest[index], upstream / total[index], own_upstream
            )
            products.scatter_(1, columns, at_target)
            torch.mm(products, real, out=parts[rows])
            if summed is not None:
                _add_product(summed[: len(real)], products, inputs)
            del products
        dist.all_reduce(parts, group=ctx.group)
        hidden_gradient = torch.zeros_like(hidden).index_copy_(0, trained, parts)
        weight_gradient = None if summed is None else _weight_gradient(weight, ctx.main_grad, summed)
        return hidden_gradient, weight_gradient, None, None, None, None, None, None


def _further_sums(signals: tuple[str, ...]) -> list[str]:
    """The signals that need a sum of their own over the vocabulary, in the order of the sums."""
    return [name for name in signals if name in ("entropy", "sum_p2")]


def _statistics(logits: torch.Tensor, columns: torch.Tensor, signals: tuple[str, ...], words: int):
    """Logits [c, w] of any type, which may be overwritten, and the labels' columns int64 [c] → fp32 [c], the largest logit;
    fp32 [2 to 4, c]: Σ exp(logit − largest), the label's logit, and, with e = exp(logit − largest), Σ e · (logit − largest)
    for `entropy` and Σ e² for `sum_p2`; and fp32 [c, words], the largest logits."""
    top = logits.topk(words).values.float() if words else logits.new_empty(len(logits), 0)
    logits = logits.float()
    target = logits.gather(1, columns.unsqueeze(1)).squeeze(1)
    largest = logits.amax(1)
    logits = logits.sub_(largest.unsqueeze(1))
    exponentials = logits.exp() if "entropy" in signals else logits.exp_()
    factors = {"entropy": logits, "sum_p2": exponentials}
    further = [torch.linalg.vecdot(exponentials, factors[name]) for name in _further_sums(signals)]
    return largest, torch.stack([exponentials.sum(1), target, *further]), top


def _logit_gradients(logits, columns, largest, scale, own_upstream):
    """Gradients of the logits [c, w], in their type: exp(logit − largest) · scale; and apart, [c, 1], those at the labels'
    columns [c, 1], where `own_upstream` is taken away. The logits may be overwritten; the others are fp32 [c]."""
    gradients = logits.float().sub_(largest.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
    at_target = gradients.gather(1, columns) - own_upstream.unsqueeze(1)
    return gradients.to(logits.dtype), at_target.to(logits.dtype)


@functools.cache
def _compiled(function):
    """`function` through torch.compile, once in a process."""
    return torch.compile(function)


def _real_rows(weight: torch.Tensor, vocabulary_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's rows of the vocabulary without the padding at its end."""
    return weight[: max(vocabulary_size - group.rank() * len(weight), 0)]


def _local_labels(labels: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup):
    """Labels as rows of this rank's weight (0 where it is another rank's), and whether they are another rank's."""
    local = labels - group.rank() * len(weight)
    elsewhere = (local < 0) | (local >= len(weight))
    return local.masked_fill(elsewhere, 0), elsewhere


def _chunks(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of at most `CHUNK_ROWS` rows; none where there are no logits (`width` 0)."""
    size = CHUNK_ROWS[device.type]
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows if width else 0, size)]


def _combine(largest, sums, signals, elsewhere, group):
    """What `_statistics` tells of this rank's words → of the whole vocabulary, with all sums, the label's logit too, relative
    to its largest logit: fp32 [n] and [2 to 4, n]."""
    overall = largest.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    below = largest - overall
    share = below.exp()
    total, target, *further = sums
    moved = {"entropy": lambda one: share * (one + below * total), "sum_p2": lambda one: share.square() * one}
    parts = [moved[name](one) for name, one in zip(_further_sums(signals), further, strict=True)]
    sums = torch.stack([share * total, torch.where(elsewhere, 0.0, target - overall), *parts])
    dist.all_reduce(sums, group=group)
    return overall, sums


def _top_of_all(top: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Each rank's largest logits fp32 [n, k], −inf where it has fewer → those of the whole vocabulary."""
    if not top.shape[1]:
        return top
    gathered = [torch.empty_like(top) for _ in range(group.size())]
    dist.all_gather(gathered, top, group=group)
    return torch.cat(gathered, dim=1).topk(top.shape[1]).values


def _predictions(signals: tuple[str, ...], sums: torch.Tensor, top: torch.Tensor) -> list[torch.Tensor]:
    """The signals, fp32 [n] each, of sums and largest logits of the whole vocabulary."""
    total = sums[0]
    further = dict(zip(_further_sums(signals), sums[2:], strict=True))
    ways = {
        "entropy": lambda: total.log() - further["entropy"] / total,
        "top1": lambda: 1 / total,  # the likeliest word has exp(0) / total
        "sum_p2": lambda: further["sum_p2"] / total.square(),
        "entropy_top20": lambda: torch.special.entr(top.softmax(1)).sum(1),
    }
    return [ways[name]() for name in signals]


def _weight_sum(weight: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor:
    """Where the weight's gradient is summed, in fp32: megatron's own buffer, or one of zeros."""
    if main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.float32)


def _add_product(summed: torch.Tensor, products: torch.Tensor, inputs: torch.Tensor) -> None:
    """summed += productsᵀ · inputs, in fp32 whatever their dtype."""
    if inputs.dtype == torch.float32:
        summed.addmm_(products.t(), inputs)
    elif inputs.is_cuda and _adds_in_place(inputs.dtype):
        torch.addmm(summed, products.t(), inputs, out_dtype=torch.float32, out=summed)
    elif inputs.is_cuda:
        summed.add_(torch.mm(products.t(), inputs, out_dtype=torch.float32))
    else:  # CPUs have no product with another output type
        summed.addmm_(products.t().float(), inputs.float())


@functools.cache
def _adds_in_place(dtype: torch.dtype) -> bool:
    """Whether this version of torch adds a product of `dtype` to an fp32 matrix on the GPU within the product.

    Versions that do not would make the whole product first, as large as the weight in fp32. They say so by an error.
    """
    summed, factor = torch.zeros(16, 16, device="cuda"), torch.zeros(16, 16, dtype=dtype, device="cuda")
    try:
        torch.addmm(summed, factor, factor, out_dtype=torch.float32, out=summed)
    except (RuntimeError, TypeError):
        return False
    return True


def _weight_gradient(weight: torch.Tensor, main_grad: torch.Tensor | None, summed: torch.Tensor) -> torch.Tensor | None:
    """What autograd is told of the weight's gradient: nothing more where it went into `main_grad` on a CPU."""
    if summed is not main_grad:
        return summed.to(weight.dtype)
    # On GPUs gradients are reduced while the backward pass goes on (`overlap_grad_reduce`, model/build.py), and DDP's hook
    # on the weight has to be set off.
    return _stand_in(weight) if weight.is_cuda else None


def _stand_in(weight: torch.Tensor) -> torch.Tensor:
    """A gradient that sets off DDP's hook, and the mark that it must not be added, as megatron's fused layers leave them.

    It must be zero where the weight is also the embedding's, whose gradient autograd adds to it.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # a mark of megatron's
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
