"""The head's gradients in bf16 on the CUDA path, whose products have another output type, against the CPU's."""

import pytest
import torch

from megatron_sstoken.model.head import IGNORE_INDEX, selective_head
from tests.emulation.running import run_pretended
from tests.helpers.distributed_runner import run_distributed

TOKENS, WIDTH, WORDS, PADDED = 40, 32, 90, 96


def gradients(rank, device: str, in_place: bool) -> tuple[list, list, list, dict[str, int]]:
    """Losses, gradients of hidden states and of the weight (in `main_grad`), and how often each product was called."""
    import torch.distributed as dist

    from tests.emulation import pretended_device

    pretended_device.adds_products_in_place = in_place
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, WIDTH, generator=generator).bfloat16().to(device).requires_grad_() for n in (TOKENS, PADDED)
    )
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    labels[::3] = IGNORE_INDEX
    weight.main_grad = torch.zeros(PADDED, WIDTH, device=device)
    with pretended_device.recording() as recorded:
        losses = selective_head(hidden, weight, labels.to(device), WORDS, dist.group.WORLD)[0]
        torch.where(losses.isnan(), 0.0, losses).sum().backward()
    counts = {name: recorded.kernels[name] for name in ("mm", "addmm", "add_")}
    return losses.tolist(), hidden.grad.tolist(), weight.main_grad.tolist(), counts


@pytest.mark.parametrize("in_place", [True, False], ids=["adds-in-place", "product-apart"])
def test_the_weights_gradient_is_summed_in_fp32(in_place):
    (expected,) = run_distributed(gradients, 1, "cpu", in_place)
    (found,) = run_pretended(gradients, 1, "cuda", in_place)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert max(abs(value) for row in found[2] for value in row) > 0
    assert found[3]["addmm"] > 0 if in_place else (found[3]["add_"] > 0 and found[3]["addmm"] <= 1)
