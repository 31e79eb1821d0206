"""What is assumed to be reached of what datasheets promise (`gpus.py`)."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """What of the datasheets is reached, and what cannot be worked out. All are printed beside a result.

    `matmul_fp8` was set so that Llama-3-8B on 8 H100 in FP8 comes within 2 % of its published throughput (see
    docs/planning.md); the others are customary values. None was measured by this project.
    """

    matmul: float = 0.68
    """Share of the dense peak that linear layers reach in bf16 and fp32."""
    matmul_fp8: float = 0.56
    """The same in FP8; casts and transposes of the operands are counted here."""
    attention: float = 0.50
    """Share of the bf16 peak that causal attention reaches, forward and backward."""
    memory: float = 0.75
    """Share of the memory bandwidth that element-wise work reaches."""
    links: float = 0.75
    """Share of the link rates that collectives and transfers to the host reach."""
    host: float = 0.6
    """Share of the host's memory bandwidth that the optimizer's update there reaches."""
    tensor_exposed: float = 1.0
    """Share of the tensor parallel communication that computation does not hide (1: no overlap)."""
    context_exposed: float = 0.2
    """The same of context parallel transfers in Transformer Engine; the torch path hides none."""
    framework_bytes: float = 3 * GIB
    """CUDA context, libraries' workspaces, NCCL buffers."""
    fragmentation: float = 0.05
    """Share of the rest that the allocator loses."""
