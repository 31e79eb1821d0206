"""Settings of the run: optimizer, training loop, checkpoints, logs."""

from dataclasses import dataclass
from typing import Literal

from megatron_sstoken.config.rules import Rules

MomentFormat = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass
class OptimizerSettings:
    """Optimizer: AdamW and its learning rate."""

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

    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are added up over micro-batches and reduced over replicas. bf16 takes half the memory
    and traffic, and rounds every sum to 8 bits: for few micro-batches a step. Not with fp32 weights."""

    first_moment_dtype: MomentFormat = "fp32"
    """Number format in which AdamW keeps its first moment between steps; it computes in fp32. Others than fp32 are megatron's
    precision-aware optimizer, and need Transformer Engine's AdamW. bf16 is customary; fp16 and fp8 have a scale per tensor."""

    second_moment_dtype: MomentFormat = "fp32"
    """The same of the second moment."""

    offload_fraction: float = 0.0
    """Share of the optimizer's state that lies in the host's memory and is updated by its processor (megatron's
    optimizer_cpu_offload). Frees up to 12 bytes a parameter over the replicas, and takes a transfer of gradients and weights
    a step. Needs Transformer Engine."""

    @property
    def is_precision_aware(self) -> bool:
        """Whether a moment is not fp32."""
        return (self.first_moment_dtype, self.second_moment_dtype) != ("fp32", "fp32")

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("optimizer", self)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_grad"):
            rules.at_least(name, 0)
        rules.require(
            self.min_learning_rate <= self.learning_rate,
            f"optimizer.min_learning_rate={self.min_learning_rate} is above "
            f"optimizer.learning_rate={self.learning_rate}: use a smaller one",
        )
        rules.in_range("warmup_fraction", 0, 1)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            rules.require(0 <= value < 1, f"optimizer.{name}={value} is outside [0, 1): use 0.9 to 0.999")
        rules.in_range("offload_fraction", 0, 1)
        for name in ("first_moment_dtype", "second_moment_dtype"):
            value = getattr(self, name)
            rules.require(
                value == "fp32" or self.offload_fraction == 0,
                f"optimizer.{name}={value} cannot go with optimizer.offload_fraction={self.offload_fraction}, which keeps "
                "moments in fp32: use one of them",
            )
        rules.require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be above 0: use 1e-8")
        return rules.broken


@dataclass
class TrainingSettings:
    """Training loop."""

    micro_batch_size: int = 1
    """Packs that a data-parallel rank computes at once."""

    global_batch_size: int = 48
    """Packs of one optimizer step, over all ranks."""

    steps: int | None = None
    """Optimizer steps; default: as many as `epochs` need."""

    epochs: int = 1
    """Passes over the data; the last batch may hold fewer packs, none is seen twice."""

    seed: int = 1234
    """Seed of the data order, of random selection and of dropout."""

    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Number format of the model's computation; losses, scores and optimizer state are fp32 in any case.

    fp8: matrix products of the layers in FP8, all else as in bf16; needs Transformer Engine and a GPU that has FP8.
    """

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 values are scaled: by the largest value of passes before (delayed), of the tensor itself (tensorwise), of
    tiles of 128 (blockwise; Hopper and CUDA 12.9) or of 32 values (mxfp8; Blackwell)."""

    fp8_first_bf16_layers: int = 0
    """With fp8: number of first layers that stay in bf16. Not with the delayed recipe."""

    fp8_last_bf16_layers: int = 0
    """With fp8: number of last layers that stay in bf16. Not with the delayed recipe."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: none, those of attention, or whole layers.

    selective is for the torch path, whose attention keeps what it computes from queries, keys and values, and for gated delta
    nets. Fused attention (Transformer Engine) keeps nothing of it: there selective costs time and saves nothing.
    """

    offload_layers: int = 0
    """Number of first layers whose activations wait in the host's memory for their backward pass (megatron's
    cpu_offloading_num_layers). Needs Transformer Engine, `parallel.pipeline` 1 and `recompute` none; frees as much memory as
    these layers' activations, if the link to the host keeps up with the computation."""

    validate_every: int = 0
    """Steps between validations; 0 validates only before the first step and at the end. Needs `data.validation`."""

    validate_first: bool = True
    """Validate before the first step, which later losses are compared with."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do in a step whose loss or gradient is not finite: stop, or leave the weights as they are and go on.

    Skipped steps are counted in the log.
    """

    verify: Literal["background", "before", "off"] = "background"
    """When to compare data, history, weights and checkpoints with their checksums: while the run goes on, and in any case
    before it saves; before it starts; or never. Files without checksums pass."""

    timeout_minutes: float = 30.0
    """Minutes that a process waits for another one, which stands still or is gone, before the run ends with an error."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("training", self)
        rules.require(
            self.timeout_minutes > 0, f"training.timeout_minutes={self.timeout_minutes} must be above 0: use 5 to 60"
        )
        for name in ("micro_batch_size", "global_batch_size", "epochs"):
            rules.at_least(name, 1)
        rules.in_range("seed", 0, 2**32 - 1)  # what numpy and torch take, and room for the offsets of ranks
        if self.steps is not None:
            rules.at_least("steps", 1)
        layers_choose = self.precision == "fp8" and self.fp8_recipe != "delayed"
        for name in ("fp8_first_bf16_layers", "fp8_last_bf16_layers"):
            rules.at_least(name, 0)
            value = getattr(self, name)
            rules.require(
                value == 0 or layers_choose,
                f"training.{name}={value} needs training.precision=fp8 and a training.fp8_recipe other than delayed: use 0",
            )
        rules.at_least("validate_every", 0)
        rules.at_least("offload_layers", 0)
        rules.require(
            self.offload_layers == 0 or self.recompute == "none",
            f"training.offload_layers={self.offload_layers} cannot go with training.recompute={self.recompute}: use one of "
            "them",
        )
        return rules.broken


@dataclass
class CheckpointSettings:
    """Checkpoints: saving and resuming."""

    directory: str | None = None
    """Folder for checkpoints; nothing is saved without it."""

    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""

    save_minutes: float = 0.0
    """Minutes between checkpoints, besides those of `save_every`, by the clock of process 0; 0: none."""

    asynchronous: bool = True
    """Write checkpoints while training goes on.

    A process of each rank writes a copy of the state in host memory, which a save that is waited for needs as well. The next
    save, and the end of the run, wait until it is whole.
    """

    keep: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""

    resume: bool | int = True
    """Resume from the newest complete checkpoint in `directory`, if there is one; a number: from that step.

    From a step: newer checkpoints are renamed to step_<number>.aside. Started again by the same command, the run goes on from
    the newest one that it has saved itself.
    """

    on_damaged: Literal["stop", "previous"] = "stop"
    """What to do where the newest checkpoint is damaged: stop and say so, or go on from the one before.

    previous: a checkpoint is compared with its checksums before it is taken; damaged ones are renamed to
    step_<number>.damaged.
    """

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("checkpoint", self)
        rules.at_least("save_every", 0)
        rules.at_least("save_minutes", 0)
        rules.at_least("keep", 0)
        rules.require(
            isinstance(self.resume, bool) or self.resume >= 1,
            f"checkpoint.resume={self.resume} is no step: use true, false, or the number of a checkpoint",
        )
        for name in ("save_every", "save_minutes"):
            value = getattr(self, name)
            rules.require(
                value == 0 or self.directory is not None,
                f"checkpoint.{name}={value} needs checkpoint.directory: name one, or use 0",
            )
        return rules.broken


@dataclass
class LoggingSettings:
    """Logs and token records."""

    directory: str | None = None
    """TensorBoard events and token records; default: `checkpoint.directory`/logs, or nothing."""

    every: int = 1
    """Steps between lines and TensorBoard points."""

    records_every: int = 0
    """Steps between token records (Parquet, one row per token); 0 writes none."""

    watch: int = 0
    """Samples, the first of the run's order, that are scored every `records_every` steps, before the first and after the last
    one, into `watched` beside the token records: the same ones each time. Each time costs a forward pass over them."""

    record_text: bool | None = None
    """Write the text of each token into its record. Default: in the files of `score` and those of watched samples, where the
    tokenizer is found; true: in training's as well, which become a tenth larger; false: nowhere."""

    entropy: bool = False
    """Add the entropy of each prediction and the probability of its likeliest token to the token records. Needs no further
    logits. Needs `model.head: selective`."""

    context_loss: bool = False
    """Compute losses of context tokens as well, for token records and history. Training needs none; costs the logits of all
    tokens."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("logging", self)
        rules.at_least("records_every", 0)
        rules.at_least("watch", 0)
        rules.at_least("every", 1)
        return rules.broken
