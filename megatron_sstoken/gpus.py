"""GPUs as their datasheets describe them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU and its share of a node; rates per GPU, one direction, in units a second."""

    name: str
    capability: tuple[int, int]
    """CUDA's compute capability."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes a second."""
    bf16: float
    """Dense matrix FLOP a second in bf16."""
    fp8: float
    """Dense matrix FLOP a second in FP8; 0 where there is none."""
    fp32: float
    """Matrix FLOP a second of fp32 as torch computes it by default (no TF32)."""
    nvlink: float
    """Bytes a second to the GPUs of its node."""
    network: float
    """Bytes a second to other nodes."""
    host_link: float
    """Bytes a second, each way, to the memory of its node's processors."""
    host_memory: float
    """Bytes a second of that memory, this GPU's share."""
    source: str
    gpus_per_node: int = 8


GPUS: dict[str, GPU] = {
    "h100": GPU(
        "H100 SXM 80 GB", (9, 0), 80e9, 3.35e12, 989e12, 1979e12, 67e12, 450e9, 50e9, 64e9, 76.8e9,
        "NVIDIA H100 datasheet (SXM; dense is half of the figure with sparsity); DGX H100: 400 Gb/s and PCIe 5.0 a GPU, two "
        "Xeon 8480C",
    ),
    "h200": GPU(
        "H200 SXM 141 GB", (9, 0), 141e9, 4.8e12, 989e12, 1979e12, 67e12, 450e9, 50e9, 64e9, 76.8e9,
        "NVIDIA H200 datasheet (SXM); DGX H200: 400 Gb/s and PCIe 5.0 a GPU, two Xeon 8480C",
    ),
    "a100-80": GPU(
        "A100 SXM 80 GB", (8, 0), 80e9, 2.039e12, 312e12, 0.0, 19.5e12, 300e9, 25e9, 32e9, 51.2e9,
        "NVIDIA A100 datasheet (SXM, 80 GB); DGX A100: 200 Gb/s and PCIe 4.0 a GPU, two EPYC 7742",
    ),
    "b200": GPU(
        "B200 180 GB", (10, 0), 180e9, 8e12, 2250e12, 4500e12, 75e12, 900e9, 50e9, 64e9, 89.6e9,
        "NVIDIA DGX B200 datasheet, an eighth of it (1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity); 400 Gb/s and PCIe 5.0 "
        "a GPU, two Xeon 8570",
    ),
}  # fmt: skip


_NAMES = {"h100": r"H100", "h200": r"G?H200", "a100-80": r"A100", "b200": r"G?B200"}
"""By which names CUDA calls them. Another form of a GPU than that of the datasheet may be slower, and is not named."""


def peak_flops(device: str, precision: str) -> float | None:
    """Matrix FLOP a second of the GPU that CUDA calls `device`, in fp32, bf16 or fp8; None where that is not known."""
    if re.search(r"PCIe|NVL\b", device):
        return None
    for key, name in _NAMES.items():
        if re.search(rf"\b{name}\b", device):
            return getattr(GPUS[key], precision) or None
    return None
