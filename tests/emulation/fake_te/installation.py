"""Transformer Engine on a pretended device: its own Python, with its compiled kernels replaced by plain torch.

Its layers are built and run as they are, forward and backward; what stands in for the kernels is in `kernels.py` (products,
norms, rotary embeddings, optimizer) and `attention.py` (packed attention, also under context parallel). FP8 is not computed.
Attention takes fp32 as well, which its kernels do not: so both backends can be compared closely.

The Python comes from the wheel on PyPI, which holds no compiled code and needs no GPU:

    pip download --no-deps transformer_engine==2.11.0
    python -m zipfile -e transformer_engine-2.11.0-py3-none-any.whl FOLDER

`SSTOKEN_TE_SOURCE=FOLDER` names it to the tests.
"""

import importlib
import os
import sys
import types
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from tests.emulation.fake_te.extension import make_extension

SOURCE = os.environ.get("SSTOKEN_TE_SOURCE", "")
"""The folder that holds `transformer_engine/`."""

_VERSIONS = ("2.10.", "2.11.")
"""Those whose kernels' arguments the stand-ins know."""

_NOT_NEEDED = (
    "triton",
    "triton.language",
    "triton.language.core",
    "triton.language.standard",
    "onnx",
    "onnxscript",
    "einops",
)
"""What it imports for kernels and exports that are never called here."""


def missing_source() -> str | None:
    """Why the tests cannot run, or None if they can."""
    if not SOURCE:
        return "SSTOKEN_TE_SOURCE does not name Transformer Engine's Python (tests/emulation/fake_te/installation.py says how)"
    if not (Path(SOURCE) / "transformer_engine" / "pytorch").is_dir():
        return f"SSTOKEN_TE_SOURCE={SOURCE} holds no transformer_engine/pytorch"
    found = [
        path.name.removesuffix(".dist-info").split("-")[1]
        for path in Path(SOURCE).glob("transformer_engine-*.dist-info")
    ]
    if not any(version.startswith(_VERSIONS) for version in found):
        return f"SSTOKEN_TE_SOURCE={SOURCE} is of version {found}: kernels take other arguments there than in 2.10 and 2.11"
    return None


def install() -> None:
    """Make `transformer_engine` importable in this process, after `pretended_device.install` and before megatron-core."""
    assert "megatron.core.extensions.transformer_engine" not in sys.modules, "megatron-core already looked for it"
    # torch finds out now whether Triton is there, not while something stands in for it.
    for name in ("torch._dynamo", "torch._inductor.standalone_compile", "torch._inductor.compile_fx"):
        importlib.import_module(name)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its check for compiled libraries is left out
    sys.path.insert(0, SOURCE)
    folder = Path(SOURCE) / "transformer_engine"
    sys.modules["transformer_engine_torch"] = make_extension(folder)

    package = types.ModuleType("transformer_engine")  # its own __init__ would load libraries
    package.__path__ = [str(folder)]
    package.__spec__ = ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = metadata.version("transformer_engine")  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = package

    stand_ins = {name: MagicMock(__version__="0") for name in _NOT_NEEDED if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        package.common = common  # type: ignore[attr-defined]
        package.pytorch = importlib.import_module("transformer_engine.pytorch")  # type: ignore[attr-defined]
    finally:
        for name in stand_ins:
            del sys.modules[name]
    package.pytorch.distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    package.pytorch.distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("backends", "utils"):
        module = importlib.import_module(f"transformer_engine.pytorch.attention.dot_product_attention.{name}")
        module.torch = _Fp32ForFp16()  # type: ignore[attr-defined]


class _Fp32ForFp16:
    """torch for modules that compare types with `torch.float16`, which nobody uses here: they take fp32 instead."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
