"""DoRA (arXiv 2402.09353), as PEFT computes it: y = m / ‖W + scale · B·A‖ · (W·x + scale · B·A·x), a row at a time.

The norm of each row is taken as a constant of the step: no gradient goes through it (section 4.3 of the paper).
"""

import torch


@torch.no_grad()
def squared_row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [out]: Σ over columns of (W + scale · B·A)², without that matrix.

    W [out, in], A [rank, in], B [out, rank]; of some columns of W and A alone it is their part of the sum.
    """
    own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    a, b, mixed = a.float(), b.float(), (weight @ a.t()).float()
    return own + 2 * scale * (mixed * b).sum(dim=1) + scale**2 * (b @ (a @ a.t()) * b).sum(dim=1)
