"""Transformer Engine by itself: a linear layer forward and backward in bf16 and each FP8 recipe, against fp32."""

import torch
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

from benchmarks.gpu.results import NotHere, Results
from megatron_sstoken.supported import fp8_problem

RECIPES = {
    "bf16": None,
    "tensorwise": recipe.Float8CurrentScaling,
    "blockwise": recipe.Float8BlockScaling,
    "delayed": recipe.DelayedScaling,
}
BOUNDS = {"bf16": 0.01}
FP8_BOUND = 0.08
"""Of the norm of the difference ÷ that of the value: e4m3 rounds by up to 6 %, sums of many less."""


def run(results: Results) -> None:
    """Every recipe that this GPU has."""
    capability, cuda = torch.cuda.get_device_capability(), torch.version.cuda
    for name, make in RECIPES.items():
        with results.attempt(name):
            if make is not None and (problem := fp8_problem(name, capability, cuda)):
                raise NotHere(problem)
            _check(results, name, None if make is None else make())


def _check(results: Results, name: str, chosen: recipe.Recipe | None) -> None:
    size = 256 if results.tiny else 4096
    torch.manual_seed(0)
    layer = te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    with te.fp8_autocast(enabled=chosen is not None, fp8_recipe=chosen):
        output = layer(inputs)
    output.backward(upstream)
    x, weight, dy = inputs.detach().float(), layer.weight.detach().float(), upstream.float()
    assert inputs.grad is not None
    found = {
        "output": (output, x @ weight.t()),
        "input gradient": (inputs.grad, dy @ weight),
        "weight gradient": (layer.weight.grad, dy.t() @ x),
    }
    bound = BOUNDS.get(name, FP8_BOUND)
    for what, (value, reference) in found.items():
        error = ((value.detach().float() - reference).norm() / reference.norm()).item()
        results.check(f"{name}: relative error of the {what}", error, bound)
