"""Configurations that runs read: planned for the hardware that they name, and written with another layout."""

import copy
import os
from dataclasses import asdict, dataclass

import yaml

from megatron_sstoken.config import Settings
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.lora_places import linears_of
from megatron_sstoken.model.lora_targets import EMBEDDING
from megatron_sstoken.model.presets import MODELS, find_architecture
from megatron_sstoken.planner.workload import LAYOUT, Workload
from megatron_sstoken.validate.layout import layout_problems
from megatron_sstoken.validate.settings import problems_of

_CHOSEN = ("micro_batch_size", "recompute")
"""Settings of the section `training` that a proposal chooses, besides the layout."""


@dataclass(frozen=True)
class Configured:
    """A run's settings and what is estimated of them."""

    settings: Settings
    workload: Workload
    notes: list[str]
    """What the estimate takes for granted."""


def read_configuration(settings: Settings, world_size: int | None = None, response: float = 1.0) -> Configured:
    """The workload of a run on `world_size` GPUs, or on as many as the configuration names (`hardware.gpus`).

    Where `model.hf_path` is no folder here, its last part may name one of the presets. Raises ValueError where the model
    cannot be told, is one of those without an estimate (`dense_architecture`), or no number of GPUs is known.
    """
    number = settings.hardware.gpus if world_size is None else world_size
    if number is None:
        raise ValueError("hardware.gpus is not set: set it, or name --world_size")
    if settings.model.hf_path is None:
        raise ValueError(f"model.hf_path is not set: name a Hugging Face folder, or one of {', '.join(MODELS)}")
    architecture, notes = _architecture_of(settings.model.hf_path)
    if settings.lora.rank and not {*linears_of(architecture)} <= {*settings.lora.targets}:
        notes.append("adapters are counted as on all linears, not only on lora.targets")
    if settings.lora.rank and EMBEDDING in settings.lora.targets:
        notes.append("the adapter of the embedding is not counted")
    if settings.lora.dora:
        notes.append("the magnitudes and norms of lora.dora are not counted")
    return Configured(settings, Workload.of_settings(settings, architecture, number, response), notes)


def problems_of_configuration(configured: Configured) -> list[str]:
    """What cannot work, in the words that the run would use. Empty when all is well."""
    settings, w = configured.settings, configured.workload
    return problems_of(settings) or layout_problems(settings, w.architecture, w.world_size)


def with_layout(settings: Settings, w: Workload, gpu: str) -> Settings:
    """The settings with the layout of `w` for its number of GPUs of the type `gpu`, all else as it is."""
    changed = copy.deepcopy(settings)
    for name in LAYOUT:
        setattr(changed.parallel, name, getattr(w, name))
    for name in _CHOSEN:
        setattr(changed.training, name, getattr(w, name))
    changed.hardware.gpus, changed.hardware.gpu = w.world_size, gpu  # type: ignore[assignment]  # a key of GPUS
    return changed


def to_yaml(settings: Settings) -> str:
    """What differs from the defaults, as YAML that `--config` reads."""
    plain, found = asdict(Settings()), {}
    for section, values in asdict(settings).items():
        if changed := {name: value for name, value in values.items() if value != plain[section][name]}:
            found[section] = changed
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def as_settings(w: Workload, model: str) -> Settings:
    """Settings of a run of a workload that no configuration describes, with the customary folders."""
    settings = w.settings()
    settings.model.hf_path = model if os.path.isdir(model) else f"models/{model}"
    settings.data.train = "data/train"
    return settings


def _architecture_of(path: str) -> tuple[Architecture, list[str]]:
    name = os.path.basename(os.path.normpath(path))
    if os.path.isdir(path) or name not in MODELS:
        return dense_architecture(path), []
    notes = [] if path == name else [f"{path} is not here: estimated by the published architecture {name}"]
    return dense_architecture(name), notes


def dense_architecture(model: str) -> Architecture:
    """`find_architecture`; raises ValueError also for a mixture of experts."""
    architecture = find_architecture(model)
    if architecture.num_experts:
        raise ValueError(
            f"the model {model!r} is a mixture of experts, for which there is no estimate: name a dense model"
        )
    return architecture
