"""Per-token loss over a vocabulary that is split over the tensor parallel group."""

import torch
import torch.distributed as dist


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
