"""Models with weights in them: the one that is trained, and the one that history is scored with."""

import os
from dataclasses import dataclass, replace

from megatron_sstoken.checkpoint.save_load import AdapterIdentity, load_checkpoint, read_adapters, resolve_checkpoint
from megatron_sstoken.config import LoraSettings, SettingsError
from megatron_sstoken.model.build import Model, broadcast_object, build_model, load_weights
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.weights import HuggingFaceWeights
from megatron_sstoken.parallel import Layout
from megatron_sstoken.validate.run import RunPlan


@dataclass(frozen=True)
class WeightsSource:
    """Where weights are read from: a Hugging Face folder, or a megatron checkpoint of that folder's architecture."""

    hf_path: str
    checkpoint: str | None = None

    @property
    def adapters(self) -> AdapterIdentity | None:
        """The adapters that the checkpoint holds, if that is what it holds."""
        return read_adapters(resolve_checkpoint(self.checkpoint)) if self.checkpoint else None

    @property
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
        if self.checkpoint is None:
            load_weights(model, self.hf_path)
        else:
            load_checkpoint(resolve_checkpoint(self.checkpoint), model)

    def fingerprint(self) -> str:
        """Of the weights' files, the base's included, and of config.json, which decides what they compute."""
        if self.checkpoint is None:
            files = HuggingFaceWeights(self.hf_path).files()
        else:
            folder = resolve_checkpoint(self.checkpoint)
            files = sorted(str(path) for path in folder.rglob("*.distcp"))
            if self.adapters is not None:
                files = [str(folder / "sstoken.json"), *files]  # it holds the base's fingerprint, rank and alpha
        return fingerprint_files([os.path.join(self.hf_path, "config.json"), *files])


def require_base(owner: str, adapters: AdapterIdentity, base: WeightsSource, layout: Layout) -> None:
    """Raise SettingsError, on all ranks, unless `base` holds the weights that the adapters were trained on."""
    found = broadcast_object(base.fingerprint() if layout.rank == 0 else None, source=0)
    if found != adapters.base_fingerprint:
        raise SettingsError(
            [
                f"the adapters of {owner} were trained on other weights than those of {base.checkpoint or base.hf_path}: "
                "set model.hf_path (and model.checkpoint) to those that their run started from"
            ]
        )


def adapter_identity(plan: RunPlan, layout: Layout) -> AdapterIdentity | None:
    """What checkpoints of this run say of their adapters; None where the weights themselves are trained."""
    lora = plan.settings.lora
    if lora.rank == 0:
        return None
    base = starting_weights(plan).base
    return AdapterIdentity(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=list(lora.targets),
        base_checkpoint=str(resolve_checkpoint(base.checkpoint).resolve()) if base.checkpoint else None,
        base_fingerprint=broadcast_object(base.fingerprint() if layout.rank == 0 else "", source=0),
    )


def starting_weights(plan: RunPlan) -> WeightsSource:
    """The weights that training starts from."""
    return WeightsSource(plan.settings.model.hf_path or "", plan.settings.model.checkpoint)


def history_weights(plan: RunPlan) -> WeightsSource:
    """The frozen weights that history is scored with: `history.hf_path`, or the starting weights."""
    return WeightsSource(plan.settings.history.hf_path) if plan.settings.history.hf_path else starting_weights(plan)


def history_model(plan: RunPlan, layout: Layout) -> Model:
    """The history model, without gradients, ready to score."""
    source = history_weights(plan)
    settings = plan.settings if source.adapters else replace(plan.settings, lora=LoraSettings())
    model = build_model(read_architecture(source.hf_path), settings, layout, trainable=False)
    source.load(model)
    return model


def model_to_train(plan: RunPlan, layout: Layout, *, trainable: bool) -> Model:
    """The model of the run with its starting weights."""
    model = build_model(
        plan.architecture, plan.settings, layout, captured_layers=plan.captured_layers, trainable=trainable
    )
    starting_weights(plan).load(model)
    return model
