"""Every setting of a run: typed, documented once, read from YAML and the command line.

Rules that need only the settings are checked here (`Settings.problems`); rules that need the model, the data or
the number of processes are in `megatron_sstoken.plan`.
"""

import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Literal

import jsonargparse

from megatron_sstoken.selection.methods import METHODS
from megatron_sstoken.selection.topk import parse_rho

BOUNDED_METHODS = ("sstoken", "rel", "attention")
"""Methods whose scores lie in [0, 1]."""


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

    vocabulary_multiple: int = 128
    """The vocabulary is padded to a multiple of this (and of the tensor parallel size); padded entries get no probability."""


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

    source: Literal["frozen"] = "frozen"
    """frozen: fixed weights score the data once, before training, into a store beside the data."""

    hf_path: str | None = None
    """Hugging Face folder of the history model; default: the starting weights."""

    store: str | None = None
    """Folder of the history losses; default: a folder under `data.train`/history named by the fingerprint."""


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

    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the model; losses, scores and optimizer state are fp32 in any case."""

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


@dataclass
class Settings:
    """Fine-tunes a Hugging Face model on selected tokens, on megatron-core."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def problems(self) -> list[str]:
        """What cannot work whatever the model, the data and the machine. Empty when all is well."""
        found: list[str] = []

        def require(holds: bool, message: str) -> None:
            if not holds:
                found.append(message)

        def at_least(name: str, value: float, least: float) -> None:
            require(value >= least, f"{name}={value} is too small: use {least} or more")

        def in_range(name: str, value: float, low: float, high: float) -> None:
            require(low <= value <= high, f"{name}={value} is outside [{low}, {high}]")

        require(self.model.hf_path is not None, "model.hf_path is not set: name a Hugging Face folder")
        require(self.data.train is not None, "data.train is not set: name a folder made by tools/prepare_data.py")
        for name in ("tensor", "pipeline", "virtual_pipeline", "context"):
            at_least(f"parallel.{name}", getattr(self.parallel, name), 1)
        require(
            self.parallel.virtual_pipeline == 1 or self.parallel.pipeline > 1,
            f"parallel.virtual_pipeline={self.parallel.virtual_pipeline} needs parallel.pipeline > 1, "
            f"which is {self.parallel.pipeline}: use virtual_pipeline=1",
        )
        require(
            not self.parallel.sequence or self.parallel.tensor > 1,
            f"parallel.sequence=true needs parallel.tensor > 1, which is {self.parallel.tensor}: use sequence=false",
        )
        at_least("model.vocabulary_multiple", self.model.vocabulary_multiple, 1)
        at_least("data.sequence_length", self.data.sequence_length, 2)
        require(
            self.selection.method in METHODS,
            f"selection.method={self.selection.method} is unknown: use one of {', '.join(METHODS)}",
        )
        for name in ("rho", "rho_min", "rho_max"):
            value = getattr(self.selection, name)
            try:
                if value != "auto":
                    parse_rho(value)
            except ValueError as error:
                found.append(f"selection.{str(error).replace('rho', name, 1)}")
        require(
            self.selection.rho_min <= self.selection.rho_max,
            f"selection.rho_min={self.selection.rho_min} is above selection.rho_max={self.selection.rho_max}: "
            "use a smaller rho_min",
        )
        require(
            self.selection.rho != "auto" or self.selection.method in BOUNDED_METHODS,
            f"selection.rho=auto needs scores between 0 and 1, which selection.method={self.selection.method} does "
            f"not give: use {' or '.join(BOUNDED_METHODS)}, or a number",
        )
        layers = self.selection.layer if isinstance(self.selection.layer, list) else [self.selection.layer]
        require(len(layers) > 0, "selection.layer=[] names no layer: use -1 for the last")
        in_range("selection.gamma", self.selection.gamma, 0, 1)
        at_least("selection.rel_floor", self.selection.rel_floor, 0)
        at_least("selection.warmup_samples", self.selection.warmup_samples, 0)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_grad"):
            at_least(f"optimizer.{name}", getattr(self.optimizer, name), 0)
        require(
            self.optimizer.min_learning_rate <= self.optimizer.learning_rate,
            f"optimizer.min_learning_rate={self.optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={self.optimizer.learning_rate}: use a smaller one",
        )
        in_range("optimizer.warmup_fraction", self.optimizer.warmup_fraction, 0, 1)
        for name in ("beta1", "beta2"):
            value = getattr(self.optimizer, name)
            require(0 <= value < 1, f"optimizer.{name}={value} is outside [0, 1)")
        require(self.optimizer.epsilon > 0, f"optimizer.epsilon={self.optimizer.epsilon} must be above 0")
        for name in ("micro_batch_size", "global_batch_size", "epochs"):
            at_least(f"training.{name}", getattr(self.training, name), 1)
        at_least("training.seed", self.training.seed, 0)
        if self.training.steps is not None:
            at_least("training.steps", self.training.steps, 1)
        for name, value in (
            ("training.validate_every", self.training.validate_every),
            ("checkpoint.save_every", self.checkpoint.save_every),
            ("checkpoint.keep", self.checkpoint.keep),
            ("logging.records_every", self.logging.records_every),
        ):
            at_least(name, value, 0)
        at_least("logging.every", self.logging.every, 1)
        require(
            self.checkpoint.save_every == 0 or self.checkpoint.directory is not None,
            f"checkpoint.save_every={self.checkpoint.save_every} needs checkpoint.directory",
        )
        require(
            self.training.validate_every == 0 or self.data.validation is not None,
            f"training.validate_every={self.training.validate_every} needs data.validation",
        )
        require(
            self.logging.records_every == 0 or self.logging_directory is not None,
            f"logging.records_every={self.logging.records_every} needs logging.directory (or checkpoint.directory)",
        )
        return found

    @property
    def logging_directory(self) -> str | None:
        """Where TensorBoard events and records go, or None."""
        if self.logging.directory is None and self.checkpoint.directory is not None:
            return os.path.join(self.checkpoint.directory, "logs")
        return self.logging.directory


def parse_settings(
    arguments: list[str] | None = None, *, program: str, description: str, extra: dict[str, dict] | None = None
) -> tuple[Settings, dict]:
    """Read settings from `--config FILE.yaml` and `--section.key=value`, later ones winning.

    `extra` adds plain options of the program (name → argparse keywords). Returns the settings and the values of the
    extra options. On a mistake jsonargparse prints the reason and exits with code 2; under torchrun only rank 0 prints.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given more than once.")
    for name, keywords in (extra or {}).items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_class_arguments(Settings, as_group=False)
    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) != 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
            # torchrun ends all processes as soon as one fails: let rank 0 print its message first.
            stack.callback(lambda: time.sleep(3) if sys.exc_info()[0] is SystemExit else None)
        namespace = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    objects = parser.instantiate(namespace)
    sections = {name: objects[name] for name in Settings.__dataclass_fields__}
    return Settings(**sections), {name: objects[name] for name in (extra or {})}
