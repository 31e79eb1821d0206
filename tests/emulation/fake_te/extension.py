"""The module `transformer_engine_torch`, which is compiled code otherwise: enumerations, and the kernels of this folder."""

import enum
import re
import types
from pathlib import Path
from typing import Any

from tests.emulation.fake_te import attention, kernels
from tests.emulation.fake_te.kernels import KERNELS

__all__ = ["attention", "kernels", "make_extension"]

_FACTS: dict[str, Any] = {
    "get_cudnn_version": lambda: 91500,
    "get_cublasLt_version": lambda: 130000,
    "get_num_cublas_streams": lambda: 4,
    "get_stream_priority_range": lambda *device: (0, -1),
    "ubuf_built_with_mpi": lambda: False,
    "device_supports_multicast": lambda *device: False,
}
"""What its Python asks of the machine."""

_FORWARD = (
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT"
)
_BACKWARD = "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"


class _MembersOnDemand(type):
    """A class whose attributes come into being when they are asked for: an enumeration that need not be written down."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = object.__new__(cls)
        member.name, member.number = name, len(vars(cls))
        setattr(cls, name, member)
        return member


class _Member(metaclass=_MembersOnDemand):
    """What an enumeration's members have in common."""

    name: str
    number: int

    def __int__(self) -> int:
        return self.number


class _Extension(types.ModuleType):
    """Kernels, facts and enumerations by name; a kernel that nothing stands in for can be named, not called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = KERNELS.get(name) or _FACTS.get(name)
        if value is None:
            value = _MembersOnDemand(name, (_Member,), {}) if name[0].isupper() else _not_there(name)
        setattr(self, name, value)
        return value


def _not_there(name: str) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"nothing stands in for Transformer Engine's kernel {name}")

    return kernel


def make_extension(source: Path) -> types.ModuleType:
    """The module, with every name that the Python under `source` takes from it."""
    module: Any = _Extension("transformer_engine_torch")
    module.__file__ = __file__
    module.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", _FORWARD, start=0)
    module.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _BACKWARD, start=0)
    backends = module.NVTE_Fused_Attn_Backend
    module.get_fused_attn_backend = lambda *what: backends.NVTE_F16_arbitrary_seqlen
    names = set(_FACTS) | set(KERNELS)
    for file in (source / "pytorch").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        names.update(re.findall(r"\btex\.([A-Za-z]\w*)", text))
        for imported in re.findall(r"^\s*from transformer_engine_torch import (\([^)]*\)|[^\n]*)", text, re.MULTILINE):
            names.update(re.findall(r"\b(?!as\b)[A-Za-z]\w*", re.sub(r"\bas \w+", "", imported)))
    module.__all__ = sorted(names)  # what its `from transformer_engine_torch import *` brings
    return module
