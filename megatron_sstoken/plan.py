"""What a run will do, worked out before it starts: settings against model, data and number of processes.

Everything that cannot work is found here and told at once; nothing here needs process groups or a GPU.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_sstoken.checks import problems_of
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.data.batches import BatchShape, RowOrder, SampleSelection, batch_shape, choose_samples
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.tokenizer import load_tokenizer
from megatron_sstoken.model.families import Architecture, read_architecture
from megatron_sstoken.model.lora import describe_trained
from megatron_sstoken.model.weights import HuggingFaceWeights, check_weights
from megatron_sstoken.parallel import processes_problem
from megatron_sstoken.selection.methods import METHODS
from megatron_sstoken.training.checkpoint import adapter_problems, checkpoint_steps, read_adapters, resolve_checkpoint

T = TypeVar("T")


@dataclass(frozen=True)
class DataPlan:
    """A prepared folder, and which of its samples a run uses in which order."""

    store: SampleStore
    samples: SampleSelection
    order: RowOrder


@dataclass(frozen=True)
class RunPlan:
    """A run whose settings have passed every check that needs no process group."""

    settings: Settings
    world_size: int
    architecture: Architecture
    train: DataPlan
    validation: DataPlan | None
    shape: BatchShape
    num_rows: int
    """Rows that training sees, over all epochs."""
    tapped_layers: tuple[int, ...]
    """Layers (from 1) whose attention is measured; empty if the method does not use it."""

    @property
    def num_steps(self) -> int:
        return -(-self.num_rows // self.shape.global_batch_size)

    @property
    def needs_history(self) -> bool:
        return METHODS[self.settings.selection.method].needs_history


class _Findings:
    """Collects problems; a part that fails to open is None and what depends on it goes unchecked."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.problems.append(message)

    def attempt(self, setting: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (ValueError, OSError) as error:
            self.problems.append(f"{setting}: {error}")
            return None


def plan_run(settings: Settings, world_size: int) -> RunPlan:
    """Check everything and work out the run. Raises SettingsError with every problem found."""
    found = _Findings(problems_of(settings))
    found.require(world_size >= 1, f"world_size={world_size} is too small: use 1 or more")
    if found.problems:
        raise SettingsError(found.problems)
    architecture = found.attempt("model.hf_path", lambda: read_architecture(settings.model.hf_path or ""))
    data_size = _check_processes(settings, world_size, found)
    if architecture:
        _check_model(settings, architecture, found)
    train = _open_data("data.train", settings.data.train, settings, architecture, found, shuffle=settings.data.shuffle)
    validation = None
    if settings.data.validation:
        validation = _open_data(
            "data.validation", settings.data.validation, settings, architecture, found, shuffle=False
        )
        if train and validation:
            ours, theirs = train.store.manifest.tokenizer_fingerprint, validation.store.manifest.tokenizer_fingerprint
            found.require(
                ours == theirs,
                f"data.validation={settings.data.validation} was prepared with another tokenizer than "
                f"data.train={settings.data.train}: prepare both with the same",
            )
    shape = _batch_shape(settings, data_size, found) if data_size else None
    _check_checkpoint(settings, found)
    if found.problems or not (architecture and train and shape):
        raise SettingsError(found.problems)
    num_rows = train.order.num_rows(settings.training.epochs)
    if settings.training.steps is not None:
        num_rows = settings.training.steps * shape.global_batch_size
    return RunPlan(
        settings=settings,
        world_size=world_size,
        architecture=architecture,
        train=train,
        validation=validation,
        shape=shape,
        num_rows=num_rows,
        tapped_layers=_tapped_layers(settings, architecture),
    )


def _check_processes(settings: Settings, world_size: int, found: _Findings) -> int:
    """Data parallel size; 0 if the processes cannot be divided."""
    parallel = settings.parallel
    product = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % product:
        found.problems.append(processes_problem(parallel, world_size))
        return 0
    return world_size // product


def divisors(number: int, limit: int = 64) -> str:
    """The divisors of `number` up to `limit`, for messages: '1, 2 or 4'."""
    values = [str(value) for value in range(1, min(number, limit) + 1) if number % value == 0]
    return " or ".join([", ".join(values[:-1]), values[-1]]) if len(values) > 1 else values[0]


def _check_split(name: str, a: Architecture, settings: Settings, found: _Findings) -> None:
    """Whether the layout and the sequence length fit `a`; `name` is what messages call it: model or history."""
    parallel = settings.parallel
    tensor = parallel.tensor
    for field, number in (("num_attention_heads", a.num_attention_heads), ("intermediate_size", a.ffn_hidden_size)):
        found.require(
            number % tensor == 0,
            f"parallel.tensor={tensor} does not divide {name}.{field}={number}: use {divisors(number)}",
        )
    groups = a.num_query_groups
    found.require(
        groups % tensor == 0 or tensor % groups == 0,
        f"parallel.tensor={tensor} neither divides nor is a multiple of {name}.num_key_value_heads={groups}: "
        f"use {divisors(groups)}",
    )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    found.require(
        a.num_layers % chunks == 0,
        f"parallel.pipeline={parallel.pipeline} × parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks} "
        f"does not divide {name}.num_hidden_layers={a.num_layers}: use a product of {divisors(a.num_layers)}",
    )
    owner = "the model" if name == "model" else f"the {name} model"
    found.require(
        settings.data.sequence_length <= a.max_positions,
        f"data.sequence_length={settings.data.sequence_length} is longer than {owner}'s "
        f"max_position_embeddings={a.max_positions}: use {a.max_positions} or less",
    )


def _check_model(settings: Settings, a: Architecture, found: _Findings) -> None:
    _check_split("model", a, settings, found)
    fused = [name for name in settings.lora.targets if name in ("q_proj", "k_proj", "v_proj")]
    found.require(
        settings.lora.rank == 0 or not fused or a.num_query_groups % settings.parallel.tensor == 0,
        f"parallel.tensor={settings.parallel.tensor} does not divide model.num_key_value_heads={a.num_query_groups}, which "
        f"adapters on {', '.join(fused)} need: use {divisors(a.num_query_groups)}, or leave them out of lora.targets",
    )
    for layer in layers_of(settings):
        found.require(
            -a.num_layers <= layer < a.num_layers,
            f"selection.layer={layer} does not exist in a model of {a.num_layers} layers: "
            f"use {-a.num_layers} to {a.num_layers - 1}",
        )
    distinct = {layer % a.num_layers for layer in layers_of(settings)}
    found.require(
        len(distinct) == len(layers_of(settings)),
        f"selection.layer={settings.selection.layer} names a layer twice in a model of {a.num_layers} layers: "
        f"use each once",
    )
    if settings.model.checkpoint is None:
        found.attempt("model.hf_path", lambda: check_weights(HuggingFaceWeights(settings.model.hf_path or ""), a))
    if settings.history.hf_path and METHODS[settings.selection.method].needs_history:
        path = settings.history.hf_path
        history = found.attempt("history.hf_path", lambda: read_architecture(path))
        if history is not None:
            _check_split("history", history, settings, found)
            found.attempt("history.hf_path", lambda: check_weights(HuggingFaceWeights(path), history))


def _open_data(
    setting: str, path: str | None, settings: Settings, a: Architecture | None, found: _Findings, *, shuffle: bool
) -> DataPlan | None:
    store = found.attempt(setting, lambda: SampleStore(path or ""))
    if store is None:
        return None
    without = int((store.response_counts == 0).sum())
    if without:
        row = int(store.rows[(store.response_counts == 0).argmax()])
        found.problems.append(
            f"{setting}={path}: {without} samples have no response token (first: input row {row}): "
            "prepare the data again with tools/prepare_data.py"
        )
    _check_vocabulary(setting, path, store, settings, a, found)
    _check_tokenizer(setting, path, store, settings, found)
    data = settings.data
    samples = found.attempt(setting, lambda: choose_samples(store, data.sequence_length, data.too_long))
    if samples is None:
        return None
    order = RowOrder(
        samples,
        seed=settings.training.seed,
        shuffle=shuffle,
        packing="first_fit" if data.packing else "none",
        capacity=data.sequence_length,
    )
    return DataPlan(store, samples, order)


def _check_vocabulary(
    setting: str, path: str | None, store: SampleStore, settings: Settings, a: Architecture | None, found: _Findings
) -> None:
    """The models must know every token of the data. Padded vocabularies of one tokenizer differ between sizes."""
    models = [("model.hf_path", settings.model.hf_path, a)]
    if settings.history.hf_path and METHODS[settings.selection.method].needs_history:
        with suppress(ValueError, OSError):  # told where the history model is checked
            models.append(("history.hf_path", settings.history.hf_path, read_architecture(settings.history.hf_path)))
    for owner, folder, architecture in models:
        if architecture is not None and store.manifest.vocabulary_size > architecture.vocabulary_size:
            found.problems.append(
                f"{setting}={path} was prepared with a vocabulary of {store.manifest.vocabulary_size}, "
                f"{owner}={folder} has {architecture.vocabulary_size}: prepare the data with the model's tokenizer"
            )


def _check_tokenizer(setting: str, path: str | None, store: SampleStore, settings: Settings, found: _Findings) -> None:
    """The tokenizer beside the model, where there is one, must be the one that made the data."""
    folder = settings.model.hf_path or ""
    present = [os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    if not any(map(os.path.isfile, present)):
        return
    candidates = [folder] + [path for path in present[1:2] if os.path.isfile(path)]
    fingerprints: list[str] = []
    for candidate in candidates:
        try:
            fingerprints.append(load_tokenizer(candidate).fingerprint)
        except Exception:  # transformers raises anything for files it cannot read; such a tokenizer proves nothing
            continue
    if fingerprints and store.manifest.tokenizer_fingerprint not in fingerprints:
        found.problems.append(
            f"{setting}={path} was prepared with another tokenizer ({store.manifest.tokenizer_path}) than the one of "
            f"model.hf_path={folder}: prepare the data with --tokenizer {folder}"
        )


def _batch_shape(settings: Settings, data_size: int, found: _Findings) -> BatchShape | None:
    training, parallel = settings.training, settings.parallel
    step = training.micro_batch_size * data_size
    if training.global_batch_size % step:
        near = sorted(
            {max(training.global_batch_size // step, 1) * step, -(-training.global_batch_size // step) * step}
        )
        found.problems.append(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} × data parallel size {data_size} = {step}: "
            f"use {' or '.join(map(str, near))}"
        )
        return None
    num_micro_batches = training.global_batch_size // step
    found.require(
        parallel.virtual_pipeline == 1 or num_micro_batches % parallel.pipeline == 0,
        f"training.global_batch_size={training.global_batch_size} gives {num_micro_batches} micro-batches; the "
        f"interleaved schedule needs a multiple of parallel.pipeline={parallel.pipeline}: "
        f"use a multiple of {step * parallel.pipeline}",
    )
    return batch_shape(
        training.micro_batch_size,
        training.global_batch_size,
        data_size,
        tensor=parallel.tensor,
        context=parallel.context,
        sequence=parallel.sequence,
    )


def _check_checkpoint(settings: Settings, found: _Findings) -> None:
    directory, start = settings.checkpoint.directory, settings.model.checkpoint
    if start is not None:
        saved = found.attempt("model.checkpoint", lambda: read_adapters(resolve_checkpoint(start)))
        found.problems += adapter_problems(f"model.checkpoint={start}", saved, settings.lora)
        found.require(
            directory is None or os.path.realpath(start) != os.path.realpath(directory),
            f"model.checkpoint={start} is checkpoint.directory: the start would move with every checkpoint; name one "
            "step_<number> of it, or another checkpoint.directory",
        )
    if directory is not None and not settings.checkpoint.resume and (steps := checkpoint_steps(directory)):
        found.problems.append(
            f"checkpoint.directory={directory} holds checkpoints of another run (step {max(steps)}), which "
            "checkpoint.resume=false would mix with new ones: name another directory, or remove them"
        )
    for setting, path in (("checkpoint.directory", directory), ("logging.directory", settings.logging.directory)):
        if path is not None and (problem := writing_problem(setting, path)):
            found.problems.append(problem)


def writing_problem(setting: str, path: str) -> str | None:
    """Why nothing can be made at `path`, or None: its nearest existing parent is not a writable folder."""
    existing = os.path.abspath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if os.path.isdir(existing) and os.access(existing, os.W_OK):
        return None
    return f"{setting}={path} cannot be written: {existing} is not a writable folder"


def layers_of(settings: Settings) -> list[int]:
    """`selection.layer` as a list."""
    layer = settings.selection.layer
    return layer if isinstance(layer, list) else [layer]


def _tapped_layers(settings: Settings, a: Architecture) -> tuple[int, ...]:
    if not METHODS[settings.selection.method].needs_attention:
        return ()
    return tuple(sorted(layer % a.num_layers + 1 for layer in layers_of(settings)))


def describe(plan: RunPlan) -> str:
    """The plan and its batch arithmetic, for people."""
    s, a, shape = plan.settings, plan.architecture, plan.shape
    parallel = s.parallel
    samples = plan.train.samples
    used = samples.lengths[samples.indices]
    rows_per_epoch = plan.train.order.num_rows(1)
    rows: list[tuple[str, Any]] = [
        ("model", f"{a.family}, {a.num_parameters():,} parameters, {a.num_layers} layers ({s.model.hf_path})"),
        (
            "vocabulary",
            f"{a.vocabulary_size:,}, padded to {a.padded_vocabulary(s.model.vocabulary_multiple, parallel.tensor):,}",
        ),
        (
            "processes",
            f"{plan.world_size} = tensor {parallel.tensor} × pipeline {parallel.pipeline}"
            + (f" (× {parallel.virtual_pipeline} chunks)" if parallel.virtual_pipeline > 1 else "")
            + f" × context {parallel.context} × data {shape.data_size}"
            + (", sequence parallel" if parallel.sequence else ""),
        ),
        (
            "data",
            f"{len(used):,} samples, {int(used.sum()):,} tokens, longest {int(used.max())} "
            f"({samples.num_truncated} truncated, {samples.num_dropped} dropped, "
            f"{samples.num_without_response} left without response)",
        ),
        (
            "batch",
            f"{shape.global_batch_size} rows = micro-batch {shape.micro_batch_size} × data {shape.data_size} × "
            f"accumulation {shape.num_micro_batches}; about "
            f"{math.ceil(used.sum() / rows_per_epoch * shape.global_batch_size):,} real tokens a step",
        ),
        (
            "rows",
            f"{rows_per_epoch:,} of up to {s.data.sequence_length} tokens an epoch, "
            + (
                f"packed {len(used) / rows_per_epoch:.1f} samples a row, "
                f"{100 * used.sum() / rows_per_epoch / s.data.sequence_length:.1f} % full"
                if s.data.packing
                else "one sample a row, padded to the longest of its batch"
            ),
        ),
        ("steps", f"{plan.num_steps:,} ({plan.num_rows / rows_per_epoch:.3g} epochs)"),
        ("selection", _describe_selection(s)),
        ("trained", describe_trained(a, s.lora)),
        ("precision", s.training.precision),
        ("checkpoints", s.checkpoint.directory or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _describe_selection(settings: Settings) -> str:
    selection = settings.selection
    if selection.method == "full":
        return "full: every response token"
    text = (
        f"{selection.method}, rho {selection.rho}, scope {selection.scope}, loss averaged by {selection.loss_average}"
    )
    if METHODS[selection.method].needs_attention:
        text += f", gamma {selection.gamma}, layer {selection.layer}"
    if METHODS[selection.method].needs_history:
        text += f", history {settings.history.source}"
        if settings.history.source == "frozen":
            text += f" ({settings.history.hf_path or 'starting weights'})"
    return text
