"""What a run will do, worked out before it starts: settings against model, data and number of processes.

Everything that cannot work is found here and told at once; nothing here needs process groups or a GPU.
"""

import glob
import json
import os
from contextlib import suppress
from functools import partial

import tokenizers

from megatron_sstoken.checkpoint.manifest import adapter_problems, checkpoint_steps, open_checkpoint
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.data.batches import PackOrder, filter_samples
from megatron_sstoken.data.external import open_external
from megatron_sstoken.data.store import SampleStore, StoreManifest
from megatron_sstoken.data.token_text import texts_of_data
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.model.backend import backend_of, machine_problems, passed_over, preferred_backend
from megatron_sstoken.model.families import Architecture, read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights, NoWeights
from megatron_sstoken.model.weights import check_weights
from megatron_sstoken.run_plan import DataPlan, RunPlan
from megatron_sstoken.selection.methods import find_method
from megatron_sstoken.selection.weights import find_weight
from megatron_sstoken.validate.adapters import check_adapters, with_own_targets
from megatron_sstoken.validate.amounts import check_amounts
from megatron_sstoken.validate.checkpoint_model import other_model
from megatron_sstoken.validate.findings import Findings
from megatron_sstoken.validate.first import writing_problems
from megatron_sstoken.validate.layout import batch_shape_of, check_fp8, check_processes, check_split, check_windows
from megatron_sstoken.validate.settings import problems_of


def plan_run(settings: Settings, world_size: int, *, dry_run: bool = False) -> RunPlan:
    """Check everything and work out the run. Raises SettingsError with every problem found.

    With `dry_run` weights that are not there yet and devices that this machine lacks are notes of the plan instead.
    """
    found = Findings(problems_of(settings), dry_run)
    found.require(world_size >= 1, f"world_size={world_size} is too small: use 1 or more")
    if found.problems:
        raise SettingsError(found.problems)
    architecture = found.attempt("model.hf_path", lambda: read_architecture(settings.model.hf_path or ""))
    data_size = check_processes(settings, world_size, found)
    found.lacks(machine_problems(settings))
    if warning := passed_over(settings):
        found.notes.append(warning)
    if architecture:
        settings = with_own_targets(settings, architecture)
        _check_model(settings, architecture, found)
    train = _open_data("data.train", settings.data.train, settings, architecture, found, shuffle=settings.data.shuffle)
    if train and settings.logging.record_text:
        manifest, beside = train.store.manifest, settings.model.hf_path
        found.attempt("logging.record_text=true", lambda: texts_of_data(manifest, [beside]))
    external = _external_values(settings, train.store.manifest, found) if train else frozenset()
    name = settings.weights.method
    if train and name is not None and find_weight(name).data == "required" and "weight" not in external:
        found.require(
            train.store.manifest.weighted,
            f"weights.method={name} needs weights in data.train={settings.data.train}, which has none, or in "
            "selection.external: use none, or prepare data that says how much a message or span counts (docs/data.md)",
        )
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
            found.notes += _differing_templates(settings, train.store.manifest, validation.store.manifest)
    has_enough = train is None or check_amounts(settings, train, found)
    shape = batch_shape_of(settings, data_size, found) if data_size and has_enough else None
    found.notes += _notes(settings, architecture, dry_run)
    _check_checkpoint(settings, architecture, found)
    if found.problems or not (architecture and train and shape):
        raise SettingsError(found.problems)
    num_packs = train.order.num_packs(settings.training.epochs)
    if settings.training.steps is not None:
        num_packs = settings.training.steps * shape.global_batch_size
    return RunPlan(
        settings=settings,
        world_size=world_size,
        architecture=architecture,
        train=train,
        validation=validation,
        shape=shape,
        num_packs=num_packs,
        captured_layers=_captured_layers(settings, architecture),
        external_values=external,
        notes=tuple(found.notes),
    )


def _external_values(settings: Settings, train: StoreManifest, found: Findings) -> frozenset[str]:
    """What the run takes of the files of `selection.external`, which must have it."""
    selection = settings.selection
    if selection.external is None:
        return frozenset()
    name = selection.external
    files = found.attempt("selection.external", lambda: open_external(name, train.data_fingerprint))
    if files is None:
        return frozenset()
    wanted = set()
    if "external" in find_method(selection.method).needs:
        value = "selected" if selection.rule_or_default == "chosen" else "score"
        other = (
            "rank its score with selection.rule=top or threshold" if value == "selected" else "name a file that has it"
        )
        found.require(value in files.values, f"selection.external={name} has no column {value}: {other}")
        wanted.add(value)
    if settings.weights.method == "external" and "weight" in files.values:
        wanted.add("weight")
    return frozenset(wanted)


def _differing_templates(settings: Settings, train: StoreManifest, validation: StoreManifest) -> list[str]:
    """A note: the losses mean something, of text in another form; and templates of other words may write the same text."""
    if train.template_fingerprint == validation.template_fingerprint:
        return []
    return [
        f"data.validation={settings.data.validation} was prepared with another chat template ({validation.template_source}) "
        f"than data.train={settings.data.train} ({train.template_source}): its losses are of a form that is not trained, "
        "unless both write the same text; prepare both with the same --chat_template"
    ]


def _notes(settings: Settings, a: Architecture | None, dry_run: bool) -> list[str]:
    """What works and does not do what is hoped for."""
    backend = preferred_backend(settings) if dry_run else backend_of(settings)
    fused = backend == "transformer_engine" and (a is None or a.delta_net is None)
    if settings.training.recompute == "none" and a is not None and a.delta_net is not None:
        return [
            "training.recompute=none keeps all that gated delta nets compute, unless flash-linear-attention does it: use "
            "selective, which keeps a small part, for the time of one more of their forward passes"
        ]
    if settings.training.recompute == "selective" and fused:
        return [
            "training.recompute=selective computes attention again and saves nothing: Transformer Engine's fused attention "
            "keeps nothing of it; use none, or full"
        ]
    return []


def _check_model(settings: Settings, a: Architecture, found: Findings) -> None:
    check_split("model", a, settings, found)
    check_adapters(settings, a, found)
    for layer in settings.selection.layers:
        found.require(
            -a.num_layers <= layer < a.num_layers,
            f"selection.layer={layer} does not exist in a model of {a.num_layers} layers: "
            f"use {-a.num_layers} to {a.num_layers - 1}",
        )
    distinct = {layer % a.num_layers for layer in settings.selection.layers}
    found.require(
        len(distinct) == len(settings.selection.layers),
        f"selection.layer={settings.selection.layer} names a layer twice in a model of {a.num_layers} layers: "
        f"use each once",
    )
    _check_captured(settings, a, found)
    check_fp8(settings, a, found)
    check_windows("model", a, settings, backend_of(settings), found)
    if _reads_folder(settings):
        _check_weights("model.hf_path", settings.model.hf_path or "", a, found)
    for setting, path in frozen_models(settings):
        frozen = found.attempt(setting, partial(read_architecture, path))
        if frozen is not None:
            check_split(setting.removesuffix(".hf_path"), frozen, settings, found)
            check_windows(setting.removesuffix(".hf_path"), frozen, settings, backend_of(settings), found)
            _check_weights(setting, path, frozen, found)


def _reads_folder(settings: Settings) -> bool:
    """Whether the weights, or those below the adapters of `model.checkpoint`, come from `model.hf_path`."""
    if settings.model.checkpoint is None:
        return True
    with suppress(ValueError):  # told where the checkpoint is checked
        adapters = open_checkpoint(settings.model.checkpoint).state.adapters
        return adapters is not None and adapters.base_checkpoint is None
    return False


def _check_weights(setting: str, path: str, a: Architecture, found: Findings) -> None:
    try:
        weights = HuggingFaceWeights(path)
    except NoWeights as error:
        found.lacks([f"{setting}: {error}"])
    except (ValueError, OSError) as error:
        found.problems.append(f"{setting}: {error}")
    else:
        found.attempt(setting, lambda: check_weights(weights, a))
        if note := weights.note():
            found.notes.append(f"{setting}: {note}")


def _open_data(
    setting: str, path: str | None, settings: Settings, a: Architecture | None, found: Findings, *, shuffle: bool
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
    samples = found.attempt(setting, lambda: filter_samples(store, data.sequence_length, data.too_long))
    if samples is None:
        return None
    order = PackOrder(
        samples,
        seed=settings.training.seed,
        shuffle=shuffle,
        packing="first_fit" if data.packing else "none",
        capacity=data.sequence_length,
    )
    return DataPlan(store, samples, order)


def _check_vocabulary(
    setting: str, path: str | None, store: SampleStore, settings: Settings, a: Architecture | None, found: Findings
) -> None:
    """The models must know every token of the data. Padded vocabularies of one tokenizer differ between sizes."""
    models = [("model.hf_path", settings.model.hf_path, a)]
    for setting, path_ in frozen_models(settings):
        with suppress(ValueError, OSError):  # told where the model is checked
            models.append((setting, path_, read_architecture(path_)))
    for owner, folder, architecture in models:
        if architecture is not None and store.manifest.vocabulary_size > architecture.vocabulary_size:
            found.problems.append(
                f"{setting}={path} was prepared with a vocabulary of {store.manifest.vocabulary_size}, "
                f"{owner}={folder} has {architecture.vocabulary_size}: prepare the data with the model's tokenizer"
            )


def _check_tokenizer(setting: str, path: str | None, store: SampleStore, settings: Settings, found: Findings) -> None:
    """The tokenizer beside the model, where there is one, must be the one that made the data."""
    folder = settings.model.hf_path or ""
    present = [os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    if not any(map(os.path.isfile, present)):
        if setting == "data.train" and glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
            found.notes.append(
                f"model.hf_path={folder} has no tokenizer, and neither will an export: copy tokenizer.json and "
                f"tokenizer_config.json of {store.manifest.tokenizer_path} there"
            )
        return
    if problem := _damaged_tokenizer(folder):
        found.problems.append(f"model.hf_path={folder}: {problem}: take another copy")
        return
    candidates = [folder] + [path for path in present[1:2] if os.path.isfile(path)]
    fingerprints: list[str] = []
    for candidate in candidates:
        try:
            fingerprints.append(load_tokenizer(candidate).fingerprint)
        except ValueError as error:  # of a kind that transformers does not read without code of the folder
            found.notes.append(
                f"{setting}: not compared with the tokenizer of model.hf_path, which cannot be read: {error}"
            )
    if fingerprints and store.manifest.tokenizer_fingerprint not in fingerprints:
        found.problems.append(
            f"{setting}={path} was prepared with another tokenizer ({store.manifest.tokenizer_path}) than the one of "
            f"model.hf_path={folder}: prepare the data with --tokenizer {folder}"
        )


def _damaged_tokenizer(folder: str) -> str | None:
    """Which file of a tokenizer is not of the form that its name promises."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            if name == "tokenizer.json":
                tokenizers.Tokenizer.from_file(path)
            else:
                with open(path, encoding="utf-8") as file:
                    json.load(file)
        except Exception as error:  # tokenizers raises Exception itself
            return f"{name} is damaged ({str(error).splitlines()[0]})"
    return None


def _check_checkpoint(settings: Settings, architecture: Architecture | None, found: Findings) -> None:
    directory, start = settings.checkpoint.directory, settings.model.checkpoint
    opened = None if start is None else found.attempt("model.checkpoint", lambda: open_checkpoint(start))
    if opened is not None:
        found.problems += adapter_problems(f"model.checkpoint={start}", opened.state.adapters, settings.lora)
        hf_path = settings.model.hf_path or ""
        if architecture and (problem := other_model(opened, architecture, hf_path)):
            found.problems.append(f"model.checkpoint={start}: {problem}: name the folder of that model")
    if start is not None:
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
    found.problems += writing_problems(settings)


def _check_captured(settings: Settings, a: Architecture, found: Findings) -> None:
    """Whether the layers whose attention is captured have some."""
    without = [str(number - 1) for number in _captured_layers(settings, a) if number - 1 not in a.attention_layers]
    remedy = f"use some of {', '.join(map(str, a.attention_layers))}"
    if not a.attention_layers:
        remedy = f"use another selection.method than {settings.selection.method}, which captures attention"
    found.require(
        not without,
        f"selection.layer={settings.selection.layer} names layers without attention ({', '.join(without)}), in place of which "
        f"model.model_type={a.family} has gated delta nets there: {remedy}",
    )


def frozen_models(settings: Settings) -> list[tuple[str, str]]:
    """Setting and folder of the models besides the one to train that the method scores by."""
    needs = find_method(settings.selection.method).needs
    named = {"hf_path": "history_loss", "reference_hf_path": "reference_loss"}
    folders = {name: getattr(settings.history, name) for name, loss in named.items() if loss in needs}
    return [(f"history.{name}", folder) for name, folder in folders.items() if folder]


def _captured_layers(settings: Settings, a: Architecture) -> tuple[int, ...]:
    if "attention" not in find_method(settings.selection.method).needs:
        return ()
    return tuple(sorted(layer % a.num_layers + 1 for layer in settings.selection.layers))
