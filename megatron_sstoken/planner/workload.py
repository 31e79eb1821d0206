"""What is estimated: a model, a layout, a batch, and how it is computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_sstoken.config import ModelSettings, ParallelSettings, Settings, WholeModule
from megatron_sstoken.config.run import MomentFormat
from megatron_sstoken.data.batches import batch_shape
from megatron_sstoken.history.source import history_sources
from megatron_sstoken.model.backend import Backend, preferred_backend, token_multiple
from megatron_sstoken.model.dtypes import weight_dtype
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.selection.methods import find_method
from megatron_sstoken.validate.layout import layout_problems
from megatron_sstoken.validate.settings import problems_of

Precision = Literal["bf16", "fp32", "fp8"]
Recompute = Literal["none", "selective", "full"]
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers", "context", "sequence")
"""Settings of the section `parallel` that a workload has."""
MOMENT_WIDTH: dict[MomentFormat, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
TRAINING = ("micro_batch_size", "global_batch_size", "precision", "fp8_recipe", "recompute", "offload_layers")
"""Those of the section `training`."""
OPTIMIZER = ("gradient_dtype", "first_moment_dtype", "second_moment_dtype", "offload_fraction")
"""Those of the section `optimizer`."""


@dataclass(frozen=True)
class Workload:
    """One training step on `world_size` GPUs. Sizes named as in the settings of a run."""

    architecture: Architecture
    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    context: int = 1
    sequence: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 48
    sequence_length: int = 2048
    precision: Precision = "bf16"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """With fp8; its tiles decide how packs are rounded."""
    recompute: Recompute = "none"
    offload_layers: int = 0
    """First layers whose activations wait in the host's memory."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    first_moment_dtype: MomentFormat = "fp32"
    second_moment_dtype: MomentFormat = "fp32"
    offload_fraction: float = 0.0
    """Share of the optimizer's state in the host's memory."""
    backend: Literal["auto", "transformer_engine", "torch"] = "auto"
    """auto: Transformer Engine, but torch in fp32."""
    head: Literal["standard", "selective"] = "selective"
    """selective: logits of response tokens only, in chunks; kept and trained only for the selected ones."""
    response: float = 1.0
    """Share of the tokens that are response."""
    rho: float = 0.6
    """Share of the response tokens that is trained on."""
    scope: Literal["sample", "microbatch", "batch"] = "sample"
    """batch scores in a forward pass of its own."""
    selects: bool = True
    """False is plain fine-tuning: no attention mass, no history, no scores."""
    history: str = "frozen"
    """Value of `history.source`."""
    lora_rank: int = 0
    """0 trains all parameters; otherwise adapters on all linears, the rest frozen."""
    train_whole: tuple[WholeModule, ...] = ()
    """Modules that are trained whole beside the adapters."""
    vocabulary_multiple: int = ModelSettings.vocabulary_multiple

    @classmethod
    def of_settings(
        cls, settings: Settings, architecture: Architecture, world_size: int, response: float = 1.0
    ) -> "Workload":
        """The workload of a run. Adapters are taken to be on all linears, a share that may change to be its largest, and what a
        threshold or a file selects to be everything."""
        training, selection = settings.training, settings.selection
        method, by_share = find_method(selection.method), selection.rule_or_default == "top"
        return cls(
            architecture,
            world_size,
            **{name: getattr(settings.parallel, name) for name in LAYOUT},
            **{name: getattr(training, name) for name in TRAINING},
            **{name: getattr(settings.optimizer, name) for name in OPTIMIZER},
            sequence_length=settings.data.sequence_length,
            backend=settings.model.backend,
            head=settings.model.head,
            response=response,
            rho=selection.largest_rho if by_share else 1.0,
            # Any other than `batch` is one pass.
            scope=selection.scope if by_share and selection.scope != "dataset" else "sample",
            selects=method.selects,
            history=settings.history.source if "history_loss" in method.needs else cls.history,
            lora_rank=settings.lora.rank,
            train_whole=tuple(settings.lora.train_whole),
            vocabulary_multiple=settings.model.vocabulary_multiple,
        )

    @cached_property
    def layers_of(self) -> Backend:
        """What the layers are made of."""
        return preferred_backend(self.settings())

    @property
    def history_passes(self) -> int:
        """Forward passes over each batch for its history losses."""
        return history_sources()[self.history].passes_per_step

    @property
    def copies_weights(self) -> bool:
        """Whether a copy of the trained weights is kept, to score history losses with."""
        return history_sources()[self.history].copies_weights

    @property
    def scoring_passes(self) -> int:
        """Forward passes of a step that only score."""
        return self.history_passes + (1 if self.selects and self.scope == "batch" else 0)

    @property
    def data(self) -> int:
        """Data parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one data parallel rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @cached_property
    def pack_tokens(self) -> int:
        """Tokens of a micro-batch of full packs over all context parallel ranks, rounded up as the loader does."""
        shape = batch_shape(
            self.micro_batch_size,
            self.global_batch_size,
            self.data,
            tensor=self.tensor,
            context=self.context,
            sequence=self.sequence,
            tokens_multiple=token_multiple(self.settings().training),
        )
        return shape.micro_batch_size * shape.pack_length(self.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.pack_tokens // self.context

    @property
    def split_tokens(self) -> int:
        """Tokens of a micro-batch on one rank where sequence parallel splits them."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @cached_property
    def stage_layers(self) -> list[int]:
        """Layers of each pipeline stage."""
        found = self.settings().parallel.stage_layers(self.architecture.num_layers)
        assert found is not None, "a workload with problems is not estimated"
        return found

    def chunk_layers(self, stage: int) -> int:
        """Layers of one model chunk of a stage."""
        return self.stage_layers[stage] // self.virtual_pipeline

    @cached_property
    def chunk_kinds(self) -> list[list[tuple[int, int]]]:
        """For each pipeline stage, and each of its model chunks: layers with attention, and those with a delta net."""
        parallel = ParallelSettings(**{name: getattr(self, name) for name in LAYOUT})
        chunks = parallel.chunk_layers(self.architecture.num_layers)
        found = [[sum(self.architecture.delta_layers[one.start : one.stop]) for one in stage] for stage in chunks]
        layers = [self.chunk_layers(stage) for stage in range(self.pipeline)]
        return [[(number - delta, delta) for delta in stage] for number, stage in zip(layers, found, strict=True)]

    @cached_property
    def stage_kinds(self) -> list[tuple[int, int]]:
        """For each pipeline stage: layers with attention, and those with a delta net."""
        return [(sum(one for one, _ in stage), sum(delta for _, delta in stage)) for stage in self.chunk_kinds]

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return weight_dtype(self.precision).itemsize

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient as it is added up."""
        return 2 if self.gradient_dtype == "bf16" else 4

    @property
    def moment_widths(self) -> tuple[int, int]:
        """Bytes of AdamW's two moments between steps."""
        return MOMENT_WIDTH[self.first_moment_dtype], MOMENT_WIDTH[self.second_moment_dtype]

    @property
    def query_width(self) -> int:
        """Query columns of one tensor parallel rank, without gates."""
        return self.architecture.num_attention_heads * self.architecture.head_dim // self.tensor

    @property
    def key_width(self) -> int:
        """Key columns of one tensor parallel rank; one group at least."""
        return max(self.architecture.num_query_groups // self.tensor, 1) * self.architecture.head_dim

    @property
    def ffn_width(self) -> int:
        """Feed-forward columns of one tensor parallel rank."""
        return self.architecture.ffn_hidden_size // self.tensor

    @property
    def vocabulary(self) -> int:
        """Vocabulary rows of one tensor parallel rank, with padding."""
        return self.architecture.padded_vocabulary(self.vocabulary_multiple, self.tensor) // self.tensor

    def settings(self, *, split: bool = True) -> Settings:
        """The settings of a run with this layout, or with `split` False with none, for the checks that runs pass."""
        settings = Settings()
        settings.model.hf_path = settings.data.train = "(estimated)"
        settings.model.vocabulary_multiple = self.vocabulary_multiple
        settings.model.backend, settings.model.head = self.backend, self.head
        if split:
            for name in LAYOUT:
                setattr(settings.parallel, name, getattr(self, name))
        settings.data.sequence_length = self.sequence_length
        for name in TRAINING:
            setattr(settings.training, name, getattr(self, name))
        for name in OPTIMIZER:
            setattr(settings.optimizer, name, getattr(self, name))
        settings.lora.rank, settings.history.source = self.lora_rank, self.history
        settings.lora.train_whole = list(self.train_whole)
        settings.selection.rho, settings.selection.scope = self.rho, self.scope
        settings.selection.method = "sstoken" if self.selects else "full"
        return settings


def problems_of_any_layout(workload: Workload) -> list[str]:
    """What no layout can change, in the words that a run would use. Empty when all is well."""
    return _problems(workload, workload.settings(split=False))


def problems_of_workload(workload: Workload) -> list[str]:
    """What cannot work, in the words that a run would use. Empty when all is well."""
    settings = workload.settings()
    return _problems(workload, settings) or layout_problems(settings, workload.architecture, workload.world_size)


def _problems(workload: Workload, settings: Settings) -> list[str]:
    found = problems_of(settings)
    if workload.world_size < 1:
        found.append(f"world_size={workload.world_size} is too small: use 1 or more")
    if not 0 < workload.response <= 1:
        found.append(f"response={workload.response} is outside (0, 1]: use a share such as 0.6")
    return found
