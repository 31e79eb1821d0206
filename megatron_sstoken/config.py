"""Every setting of a run: typed, documented once, read from YAML and the command line.

`megatron_sstoken.command_line` reads them. Rules that need only the settings are in `megatron_sstoken.validate`. Others need
the model, the data or the number of processes.
"""

import os
from dataclasses import dataclass, field
from typing import Literal, get_args


class SettingsError(ValueError):
    """One or more settings cannot work; the message lists all of them, one a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass
class ModelSettings:
    """The model to fine-tune."""

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
    """What layers are made of: NVIDIA's Transformer Engine (fused kernels, FlashAttention or cuDNN attention; needs a GPU) or
    torch. auto: Transformer Engine where it can run and `training.precision` is not fp32."""


@dataclass
class ParallelSettings:
    """How the model and the batch are split over processes. What is left of the processes is data parallel."""

    tensor: int = 1
    """Tensor parallel size: attention heads, feed-forward columns and the vocabulary are split."""

    pipeline: int = 1
    """Pipeline parallel size: layers are split into consecutive stages."""

    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."""

    context: int = 1
    """Context parallel size: the tokens of every sample are split."""

    expert: int = 1
    """Expert parallel size: the experts of a mixture are dealt out over the ranks of a pipeline stage."""

    sequence: bool = False
    """Sequence parallel: norms and residuals are split over the tensor parallel group. Needs tensor > 1."""


@dataclass
class DataSettings:
    """What is read."""

    train: str | None = None
    """Folder made by `tools/prepare_data.py`."""

    validation: str | None = None
    """Another such folder, for the validation loss."""

    sequence_length: int = 2048
    """Longest sample in tokens; the length of a row."""

    too_long: Literal["truncate", "drop"] = "truncate"
    """Samples longer than `sequence_length` are cut to it, or left out. Either is counted and shown."""

    packing: bool = True
    """Put several samples into a row of `sequence_length` tokens; they do not see each other. Otherwise rows are padded."""

    shuffle: bool = True
    """A new order every epoch, from `training.seed`."""


@dataclass
class SelectionSettings:
    """Which response tokens are trained on."""

    method: str = "sstoken"
    """sstoken, full (every response token), random, or another name of `selection/methods.py`."""

    rho: float | Literal["auto"] = 0.6
    """Share of the response tokens to train on, in (0, 1]; of n tokens the ceil(rho·n) best are taken, exactly.

    auto: chosen for every global batch at the cut that separates its low from its high scores best (Otsu), between
    `rho_min` and `rho_max`; costs a forward pass, as `scope: batch` does.
    """

    rho_min: float = 0.3
    """Smallest share that `rho: auto` may choose."""

    rho_max: float = 0.9
    """Largest share that `rho: auto` may choose."""

    gamma: float = 0.5
    """Weight of the retrospective excess loss in the score; 1 − gamma is the weight of the attention."""

    layer: int | list[int] = -1
    """Layer whose attention is scored, from 0; negative numbers count from the last. Of a list the mean is taken."""

    scope: Literal["sample", "microbatch", "batch"] = "sample"
    """Which tokens compete: those of one sample (the paper), of one micro-step over all ranks, or of the global batch.

    batch is exact over the whole global batch, and costs a forward pass more: every score is needed before the first
    gradient.
    """

    loss_average: Literal["token", "sample", "microbatch"] = "token"
    """The loss of a global batch: over its selected tokens, each alike; a mean per sample, then over samples (paper,
    Eq. 11); or a mean per micro-batch of one data-parallel rank, then over those (official code)."""

    rel_floor: float = 1e-3
    """If the excess losses of a sample spread less than this (nat), they count as equal. 0 is the official code."""

    warmup_samples: int = 0
    """For so many samples gamma is 0: at the start the history model and the model are the same."""


@dataclass
class HistorySettings:
    """Where history losses come from."""

    source: str = "frozen"
    """frozen: fixed weights score the data once, before training, into a store beside the data.

    adapters_off: the model that is trained scores each batch with its adapters switched off, one forward pass a step; no
    store, no second model. Needs lora.rank > 0.
    """

    hf_path: str | None = None
    """Hugging Face folder of the history model; default: the starting weights."""

    store: str | None = None
    """Folder of the history losses; default: a folder under `data.train`/history named by the fingerprint."""


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class LoraSettings:
    """Low-rank adapters: small matrices beside frozen weights are trained instead of the weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""

    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Share of the adapters' inputs that is set to zero while training."""

    targets: list[LoraTarget] = field(default_factory=lambda: list(get_args(LoraTarget)))
    """The linears that get adapters, by their names in the Hugging Face model (PEFT's target_modules); default: all."""


@dataclass
class OptimizerSettings:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-5
    """Highest learning rate."""

    min_learning_rate: float = 0.0
    """Learning rate at the end."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after the warm-up."""

    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""

    beta1: float = 0.9
    """AdamW's first moment."""

    beta2: float = 0.95
    """AdamW's second moment."""

    epsilon: float = 1e-8
    """AdamW's epsilon."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass
class TrainingSettings:
    """The run."""

    micro_batch_size: int = 1
    """Rows a data-parallel rank computes at once."""

    global_batch_size: int = 48
    """Rows of one optimizer step, over all ranks."""

    steps: int | None = None
    """Optimizer steps; default: as many as `epochs` need."""

    epochs: int = 1
    """Passes over the data; the last batch may hold fewer rows, none is seen twice."""

    seed: int = 1234
    """Seed of the data order, of random selection and of dropout."""

    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Arithmetic of the model; losses, scores and optimizer state are fp32 in any case.

    fp8: matrix products of the layers in FP8, all else as in bf16; needs Transformer Engine and a GPU that has FP8.
    """

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 values are scaled: by the largest value of passes before (delayed), of the tensor itself (tensorwise), of
    tiles of 128 (blockwise; Hopper and CUDA 12.9) or of 32 values (mxfp8; Blackwell)."""

    fp8_first_bf16_layers: int = 0
    """With fp8: so many of the first layers stay in bf16. Not with the delayed recipe."""

    fp8_last_bf16_layers: int = 0
    """With fp8: so many of the last layers stay in bf16. Not with the delayed recipe."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, attention only, or whole layers."""

    validate_every: int = 0
    """Steps between validations; 0 validates only at the end. Needs `data.validation`."""


@dataclass
class CheckpointSettings:
    """Saving and resuming."""

    directory: str | None = None
    """Where checkpoints lie; nothing is saved without it."""

    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""

    keep: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""

    resume: bool = True
    """Go on from the newest complete checkpoint in `directory`, if there is one."""


@dataclass
class LoggingSettings:
    """What the run tells."""

    directory: str | None = None
    """TensorBoard events and token records; default: `checkpoint.directory`/logs, or nothing."""

    every: int = 1
    """Steps between lines and TensorBoard points."""

    records_every: int = 0
    """Steps between token records (Parquet, one row a token); 0 writes none."""

    entropy: bool = False
    """Token records tell the entropy of each prediction and the probability of its likeliest token. Costs no further
    logits. Needs `model.head: selective`."""

    context_loss: bool = False
    """Losses of context tokens, too, in token records and history. Training needs none; costs the logits of all tokens."""


@dataclass
class Settings:
    """Fine-tunes a Hugging Face model on selected tokens, on megatron-core."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    @property
    def logging_directory(self) -> str | None:
        """Where TensorBoard events and records go, or None."""
        if self.logging.directory is None and self.checkpoint.directory is not None:
            return os.path.join(self.checkpoint.directory, "logs")
        return self.logging.directory
