"""One section in this process: python -m benchmarks.gpu.child '{"section": …}', as `benchmarks/gpu_all.py` starts it."""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import NotHere, Results, append_line
from megatron_sstoken.doctor import version_of

PACKAGES = {"torch": "torch", "megatron_core": "megatron-core", "transformer_engine": "transformer-engine"}


def environment() -> dict[str, Any]:
    """Versions and device of this process."""
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0]}
    found |= {name: version_of(package) for name, package in PACKAGES.items()}
    on_gpu = torch.cuda.is_available()
    return found | {
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "device_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on_gpu else None,
    }


def require(need: str) -> None:
    """Raise NotHere where this machine lacks what a section needs."""
    from megatron_sstoken.device import have_cuda

    if not have_cuda():
        raise NotHere("this machine has no CUDA device (or SSTOKEN_DEVICE=cpu hides it)")
    if need == "transformer_engine":
        from megatron_sstoken.model.backend import transformer_engine_problem

        if problem := transformer_engine_problem():
            raise NotHere(problem)


def main(arguments: list[str]) -> int:
    """Run the section that the JSON argument describes; 0 also where this machine cannot show it."""
    request = json.loads(arguments[0])
    os.environ.setdefault("NVTE_DEBUG", "1")  # Transformer Engine says which attention backend it takes
    os.environ.setdefault("NVTE_DEBUG_LEVEL", "1")
    # Where it is when its time is over stands in the log.
    faulthandler.dump_traceback_later(max(request["seconds"] - 2, 1))
    path = Path(request["path"])
    append_line(path, {"section": request["section"], "kind": "environment"} | environment())
    results = Results(path, request["section"], request["tiny"], Path(request["work"]), request["seconds"])
    try:
        for need in request["needs"]:
            require(need)
        module, function = request["function"].split(":")
        getattr(importlib.import_module(module), function)(results)
    except NotHere as reason:
        results.absent("this section", str(reason))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
