"""The sections of `benchmarks/gpu_all.py`, the most telling first, and the targets that their figures stand beside."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Section:
    """Something to be shown in a process of its own."""

    name: str
    function: str
    """`module:function`, which takes `Results`."""
    limit: float
    """Seconds after which it is ended."""
    shows: str
    needs: tuple[Literal["cuda", "transformer_engine"], ...] = ()


@dataclass(frozen=True)
class Target:
    """A figure to reach on one H100."""

    name: str
    section: str
    goal: float
    at_least: bool
    source: str

    def is_met(self, measured: float) -> bool:
        return measured >= self.goal if self.at_least else measured <= self.goal


_HERE = "benchmarks.gpu."
SECTIONS = (
    Section("machine", _HERE + "machine:run", 75, "what `doctor` says, the rate of matrix products and copies"),
    Section(
        "engine", _HERE + "engine:run", 60, "Transformer Engine's linear in bf16 and each FP8 recipe, against fp32",
        ("transformer_engine",),
    ),
    Section(
        "tap", _HERE + "tap:run", 75,
        "the attention mass through the kernel against a dense fp64 reference: packs, grouped queries, window, bf16, FP8; "
        "the attention backend in use",
    ),
    Section(
        "agreement", _HERE + "agreement:run", 90,
        "three training steps in bf16 (Transformer Engine, torch) and FP8 against fp32: loss, norm, tokens selected by both",
    ),
    Section(
        "speed_8b", _HERE + "speed:eight_billion", 100,
        "8B shape with as many layers as fit, at 4,096 tokens: full, random selection, ssToken",
    ),
    Section(
        "speed_1b", _HERE + "speed:one_billion", 150,
        "1B at 4,096 tokens: full, random selection, ssToken, compiled head, fused weight gradients; short samples packed",
    ),
    Section("lora_8b", _HERE + "speed:lora", 90, "LoRA of 8B at 4,096 tokens, all layers"),
    Section(
        "trace", _HERE + "trace:run", 90,
        "a profiler's trace, waits of the host by line, idle share of the GPU in a step, the longest kernels",
    ),
    Section("fp8", _HERE + "speed:fp8", 120, "8B shape in each FP8 recipe against bf16", ("transformer_engine",)),
    Section("resume", _HERE + "resume:run", 90, "saving, and going on from the checkpoint as if nothing had been"),
    Section("memory", _HERE + "memory:run", 90, "memory against the planner's figures, by part", ("cuda",)),
)  # fmt: skip

SSTOKEN_8B = "ssToken ÷ plain fine-tuning, time of a step, 8B shape, bf16"
SSTOKEN_1B = "ssToken ÷ plain fine-tuning, time of a step, 1B, bf16"
LORA_8B = "LoRA of 8B at 4,096 tokens, tokens/s"
FP8_8B = "FP8 ÷ bf16, tokens/s, 8B shape"
TARGETS = (
    Target(SSTOKEN_8B, "speed_8b", 1.00, False, "selection costs nothing"),
    Target(SSTOKEN_1B, "speed_1b", 0.92, False, "the head is a larger part of a small model"),
    Target(LORA_8B, "lora_8b", 12473, True, "NeMo AutoModel on one H100"),
    Target(FP8_8B, "fp8", 1.3, True, "what FP8 is for"),
)
