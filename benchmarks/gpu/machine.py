"""What the machine is, by `doctor`, and what it can do at most."""

import contextlib
import io
import json
from collections.abc import Callable

import torch

from benchmarks.gpu.results import Results
from benchmarks.measure import seconds_of
from megatron_sstoken import doctor
from megatron_sstoken.device import compute_device


def run(results: Results) -> None:
    """doctor's components and complaints; rates."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = doctor.main(["--json"])
    found = json.loads(output.getvalue())
    for component, what in found["components"].items():
        results.row("what doctor says", component=component, **{"runs on": what})
    for kind in ("missing", "warnings", "errors"):
        for text in found[kind]:
            results.row("what doctor misses", kind=kind, text=text)
    results.check("doctor's exit code", code, 0)
    size = 256 if results.tiny else 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device=compute_device())
    results.row(
        "rates", what=f"bf16 product of {size}", rate=2 * size**3 / _fastest(lambda: a @ a) / 1e12, unit="TFLOP/s"
    )
    numbers = torch.empty(2**20 if results.tiny else 2**30, dtype=torch.uint8, device=compute_device())
    copy = torch.empty_like(numbers)
    seconds = _fastest(lambda: copy.copy_(numbers))
    results.row("rates", what="copy within the device", rate=2 * numbers.numel() / seconds / 1e9, unit="GB/s")


def _fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    function()
    return min(seconds_of(function) for _ in range(8))
