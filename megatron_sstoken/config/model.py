"""Settings of what is computed, on what, and from which data."""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, get_args

from megatron_sstoken.config.rules import Rules


@dataclass
class ModelSettings:
    """Model to fine-tune."""

    hf_path: str | None = None
    """Hugging Face folder (config.json, safetensors, tokenizer) with the architecture and the starting weights."""

    checkpoint: str | None = None
    """megatron checkpoint made by `tools/convert_checkpoint.py from-hf` or by a run; replaces the weights of `hf_path`."""

    head: Literal["selective", "standard"] = "selective"
    """How losses are computed: selective makes logits of response tokens only, and gradients of selected tokens only, a
    chunk at a time; standard keeps the logits of every token. The losses and gradients are the same."""

    compiled_head: bool = False
    """Let torch.compile make one kernel of what the selective head does to logits between its matrix products. Needs Triton on
    a GPU, a C++ compiler without one. Off: it has not been measured on a GPU yet."""

    vocabulary_multiple: int = 128
    """The vocabulary is padded to a multiple of this (and of the tensor parallel size); padded entries get no probability."""

    backend: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Implementation of the layers: Transformer Engine (NVIDIA's fused kernels, FlashAttention or cuDNN attention; needs a GPU)
    or torch. auto: Transformer Engine where it can run and `training.precision` is not fp32."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("model", self)
        rules.require(self.hf_path is not None, "model.hf_path is not set: name a Hugging Face folder")
        rules.at_least("vocabulary_multiple", 1)
        rules.require(
            not self.compiled_head or self.head == "selective",
            f"model.compiled_head=true needs model.head=selective, which is {self.head}: use compiled_head=false",
        )
        return rules.broken


@dataclass
class ParallelSettings:
    """Parallelism: how model and batch are split over processes. The remaining processes are data parallel."""

    tensor: int = 1
    """Tensor parallel size: attention heads, feed-forward columns and the vocabulary are split."""

    pipeline: int = 1
    """Pipeline parallel size: layers are split into consecutive stages."""

    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, which has the embedding, too; the other stages share the rest evenly. Default: as
    many as the others. For numbers of layers that the stages do not divide, and for stages that take equally long."""

    last_stage_layers: int | None = None
    """The same of the last pipeline stage, which has the vocabulary head, the losses and the selection, too."""

    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."""

    context: int = 1
    """Context parallel size: the tokens of every sample are split."""

    expert: int = 1
    """Expert parallel size: the experts of a mixture are distributed over the ranks of a pipeline stage."""

    sequence: bool = False
    """Sequence parallel: norms and residuals are split over the tensor parallel group. Needs tensor > 1."""

    def stage_layers(self, num_layers: int) -> list[int] | None:
        """Layers of each pipeline stage for a model of `num_layers`; None where they cannot be dealt out that way.

        As megatron-core does it: stages whose number is not set are equal, and all chunks of a stage are.
        """
        given = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        own = {stage: layers for stage, layers in given.items() if layers is not None}
        others, left = self.pipeline - len(own), num_layers - sum(own.values())
        if left < others or (left % others if others else left):
            return None
        found = [own.get(stage, left // max(others, 1)) for stage in range(self.pipeline)]
        return None if any(layers % self.virtual_pipeline for layers in found) else found

    def chunk_layers(self, num_layers: int) -> list[list[range]]:
        """For each pipeline stage the layers (from 0) of each of its chunks; empty where they cannot be dealt out."""
        stages = self.stage_layers(num_layers) or []
        sizes = [layers // self.virtual_pipeline for _ in range(self.virtual_pipeline) for layers in stages]
        chunks = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        return [chunks[stage :: len(stages)] for stage in range(len(stages))]

    def uneven_ends(self, num_layers: int) -> tuple[int, int] | None:
        """Layers of the first and the last stage that leave the others equal; None where no uneven stages do.

        The others are longer by as little as can be, since the ends have the embedding and the head, too; where there are too
        few layers for that, the ends are longer.
        """
        stages, chunks = self.pipeline, self.virtual_pipeline
        if num_layers % chunks or stages == 1:
            return None
        units = num_layers // chunks  # layers that a stage gains or loses together, one a chunk
        for other in (units // stages + 1, units // stages):
            ends = units - (stages - 2) * other
            first, last = (ends + 1) // 2, ends // 2
            if stages == 2 and first == last:
                first, last = first + 1, last - 1
            if last > 0 and other > 0 and (first, last) != (other, other):
                return first * chunks, last * chunks
        return None

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("parallel", self)
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
            rules.at_least(name, 1)
        for name in ("first_stage_layers", "last_stage_layers"):
            value = getattr(self, name)
            if value is not None:
                rules.at_least(name, 1)
                rules.require(
                    self.pipeline > 1,
                    f"parallel.{name}={value} needs parallel.pipeline > 1, which is {self.pipeline}: leave it out",
                )
        rules.require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1, "
            f"which is {self.pipeline}: use virtual_pipeline=1",
        )
        rules.require(
            not self.sequence or self.tensor > 1,
            f"parallel.sequence=true needs parallel.tensor > 1, which is {self.tensor}: use sequence=false",
        )
        return rules.broken


@dataclass
class HardwareSettings:
    """Hardware that a configuration is meant for, read by `tools/plan.py`. A run takes the hardware that it is started on."""

    gpus: int | None = None
    """Number of GPUs."""

    gpu: Literal["h100", "h200", "a100-80", "b200"] = "h100"
    """Their type."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("hardware", self)
        if self.gpus is not None:
            rules.at_least("gpus", 1)
        return rules.broken


@dataclass
class DataSettings:
    """Training and validation data."""

    train: str | None = None
    """Folder made by `tools/prepare_data.py`."""

    validation: str | None = None
    """Another such folder, for the validation loss."""

    sequence_length: int = 2048
    """Longest sample in tokens; the length of a pack."""

    too_long: Literal["truncate", "drop"] = "truncate"
    """Samples longer than `sequence_length` are cut to it, or left out. Either is counted and shown."""

    packing: bool = True
    """Put several samples into a pack of `sequence_length` tokens; they do not see each other. Otherwise a sample is padded."""

    shuffle: bool = True
    """A new order every epoch, from `training.seed`."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("data", self)
        rules.require(self.train is not None, "data.train is not set: name a folder made by tools/prepare_data.py")
        rules.at_least("sequence_length", 2)
        return rules.broken


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer, which `lora.targets` may be."""
WholeModule = Literal["embed_tokens", "lm_head"]
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LatentLinear = Literal["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
"""What makes queries, keys and values of latents (DeepSeek V3)."""
DeltaLinear = Literal["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj"]
"""The linears of gated delta nets: what goes in, of Qwen3.5 and of Qwen3-Next, and what comes out of both."""
LoraTarget = Literal[Linear, LatentLinear, DeltaLinear, "embed_tokens"]
LINEARS: tuple[LoraTarget, ...] = get_args(Literal[Linear, LatentLinear, DeltaLinear])
"""The targets that `all-linear` stands for: those of them that a model has (no model has all)."""


def adapter_scale(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """LoRA's scale, alpha / rank; or rsLoRA's, alpha / √rank."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


@dataclass
class LoraSettings:
    """LoRA: training of low-rank adapters beside frozen weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""

    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank; with `rank_stabilized` by alpha / √rank."""

    rank_stabilized: bool = False
    """rsLoRA (arXiv 2312.03732; PEFT's use_rslora): a scale that high ranks learn as well with."""

    dropout: float = 0.0
    """Share of the adapters' inputs that is set to zero while training."""

    targets: list[LoraTarget] = field(default_factory=lambda: list(LINEARS))
    """The linears that get adapters, by their names in the Hugging Face model (PEFT's target_modules); default: all that the
    model has, which `all-linear` says, too. In a mixture gate_proj, up_proj and down_proj are those of every expert, of shared
    experts and of dense layers. embed_tokens, the embedding, is named apart."""

    dora: bool = False
    """DoRA (arXiv 2402.09353; PEFT's use_dora): each row of the adapted weight gets a trained length, its direction is that
    of W + scale · B·A."""

    train_whole: list[WholeModule] = field(default_factory=list)
    """Modules that are trained whole beside the adapters, as for new tokens (PEFT's modules_to_save); the embedding and the
    head, both or neither where they are tied."""

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by."""
        return adapter_scale(self.alpha, self.rank, rank_stabilized=self.rank_stabilized)

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("lora", self)
        rules.require(self.rank >= 0, f"lora.rank={self.rank} is too small: use 0 (no adapters) or more")
        rules.require(self.alpha > 0, f"lora.alpha={self.alpha} must be above 0: use the rank, or twice it")
        rules.require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} is outside [0, 1): use 0 for none")
        rules.require(
            len(self.targets) > 0, "lora.targets=[] names no linear: leave it out for all, or use lora.rank=0"
        )
        rules.require(
            len(set(self.targets)) == len(self.targets),
            f"lora.targets={self.targets} names a linear twice: use each once",
        )
        rules.require(
            not self.dora or self.dropout == 0,
            f"lora.dora=true with lora.dropout={self.dropout} would compute every linear a second time, on what dropout "
            "leaves: use lora.dropout=0",
        )
        rules.require(
            not self.dora or "embed_tokens" not in self.targets,
            f"lora.dora=true is for linears, and lora.targets={self.targets} names the embedding: leave out embed_tokens",
        )
        rules.require(
            "embed_tokens" not in self.targets or "embed_tokens" not in self.train_whole,
            f"lora.targets={self.targets} and lora.train_whole={self.train_whole} both name embed_tokens: use one of them",
        )
        rules.require(
            len(set(self.train_whole)) == len(self.train_whole),
            f"lora.train_whole={self.train_whole} names a module twice: use each once",
        )
        rules.require(
            self.rank > 0 or not self.train_whole,
            f"lora.train_whole={self.train_whole} stands beside adapters, and lora.rank=0 trains all weights: leave it out",
        )
        return rules.broken
