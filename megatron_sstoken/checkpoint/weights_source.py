"""Where a model's weights come from: a Hugging Face folder, a checkpoint, or adapters on one of these."""

import functools
import os
from dataclasses import dataclass

from megatron_sstoken.checkpoint.manifest import (
    STATE_FILE,
    AdapterIdentity,
    Checkpoint,
    open_checkpoint,
    resolve_checkpoint,
)
from megatron_sstoken.checkpoint.save_load import load_checkpoint
from megatron_sstoken.config import LoraSettings, Settings, SettingsError
from megatron_sstoken.model.build import Model, load_weights
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.identity import ModelIdentity, told, weight_digests
from megatron_sstoken.model.lora import start_magnitudes
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import check_weights
from megatron_sstoken.parallel import Layout, broadcast_object


@dataclass(frozen=True)
class WeightsSource:
    """Where weights are read from: a Hugging Face folder, or a megatron checkpoint of that folder's architecture."""

    hf_path: str
    checkpoint: str | None = None

    @functools.cached_property
    def stored(self) -> Checkpoint | None:
        """The checkpoint, with what it says of itself."""
        return open_checkpoint(self.checkpoint) if self.checkpoint else None

    @property
    def adapters(self) -> AdapterIdentity | None:
        """The adapters that the checkpoint holds, if that is what it holds."""
        return self.stored.state.adapters if self.stored else None

    @functools.cached_property
    def base(self) -> "WeightsSource":
        """The weights without adapters."""
        adapters = self.adapters
        return self if adapters is None else WeightsSource(self.hf_path, adapters.base_checkpoint)

    def load(self, model: Model) -> None:
        """Fill the model, base first; all ranks call it. Adapters that are not stored here stay as they are.

        Raises SettingsError where stored adapters belong to another base.
        """
        if self.adapters is not None:
            require_base(self.checkpoint or "", self.adapters, self.base, model.layout)
            self.base.load(model)
        if self.stored is None:
            load_weights(model, self.hf_path)
        else:
            load_checkpoint(self.stored, model)
        if self.adapters is None:
            start_magnitudes(model.unwrapped)

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """The model that the weights make, for adapters to remember. Of a checkpoint its files count, as they were written.

        Raises ValueError where the weights are not those of the architecture.
        """
        architecture = read_architecture(self.hf_path)
        if self.stored is None:
            tensors = HuggingFaceWeights(self.hf_path)
            check_weights(tensors, architecture)
            weights = weight_digests(tensors, architecture)
        else:
            files = sorted(self.stored.folder.rglob("*.distcp"))
            weights = {path.name: fingerprint_files([str(path)])[:32] for path in files}
        return ModelIdentity(told(architecture), weights)

    def fingerprint(self) -> str:
        """Of the weights' files, the base's included, and of config.json, which decides what they compute."""
        if self.stored is None:
            files = HuggingFaceWeights(self.hf_path).files()
        else:
            folder = self.stored.folder
            files = sorted(str(path) for path in folder.rglob("*.distcp"))
            if self.adapters is not None:
                files = [str(folder / STATE_FILE), *files]  # it holds the base's fingerprint, rank and alpha
        return fingerprint_files([os.path.join(self.hf_path, "config.json"), *files])


def base_problem(adapters: AdapterIdentity, base: WeightsSource) -> str | None:
    """How `base` differs from what the adapters were trained on, for people; None where it does not."""
    if adapters.base is not None:
        return "; ".join(adapters.base.differences(base.identity)) or None
    if base.fingerprint() == adapters.base_fingerprint:
        return None
    return "a byte of its weights or of config.json, which is all that checkpoints of versions before can tell"


def require_base(owner: str, adapters: AdapterIdentity, base: WeightsSource, layout: Layout) -> None:
    """Raise SettingsError, on all ranks, unless `base` holds the weights that the adapters were trained on."""
    problem = broadcast_object(base_problem(adapters, base) if layout.rank == 0 else None, source=0)
    if problem:
        raise SettingsError(
            [
                f"the adapters of {owner} were trained on other weights than those of {base.checkpoint or base.hf_path} "
                f"({problem}): set model.hf_path (and model.checkpoint) to those that their run started from"
            ]
        )


def starting_weights(settings: Settings) -> WeightsSource:
    """The weights that training starts from."""
    return WeightsSource(settings.model.hf_path or "", settings.model.checkpoint)


def adapter_identity(lora: LoraSettings, start: WeightsSource, layout: Layout) -> AdapterIdentity | None:
    """What checkpoints of a run that started from `start` say of their adapters; None where it trains the weights themselves.

    All ranks call it.
    """
    if lora.rank == 0:
        return None
    base = start.base
    identity = broadcast_object(base.identity if layout.rank == 0 else None, source=0)
    assert identity is not None, "process 0 has sent it"
    checkpoint = str(resolve_checkpoint(base.checkpoint).resolve()) if base.checkpoint else None
    return AdapterIdentity.of(lora, identity, checkpoint)
