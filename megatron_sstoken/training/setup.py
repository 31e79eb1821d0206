"""Models with weights in them: the one that is trained, and the one that history is scored with."""

import os
from dataclasses import dataclass

from megatron_sstoken.model.build import Model, build_model, load_weights
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.weights import HuggingFaceWeights
from megatron_sstoken.parallel import Layout
from megatron_sstoken.plan import RunPlan
from megatron_sstoken.training.checkpoint import load_checkpoint, resolve_checkpoint


@dataclass(frozen=True)
class WeightsSource:
    """Where weights are read from: a Hugging Face folder, or a megatron checkpoint of that folder's architecture."""

    hf_path: str
    checkpoint: str | None = None

    def load(self, model: Model) -> None:
        """Fill the model; all ranks call it."""
        if self.checkpoint is None:
            load_weights(model, self.hf_path)
        else:
            load_checkpoint(resolve_checkpoint(self.checkpoint), model)

    def fingerprint(self) -> str:
        """Of the weights' files and of config.json, which decides what they compute."""
        if self.checkpoint is None:
            files = HuggingFaceWeights(self.hf_path).files()
        else:
            folder = resolve_checkpoint(self.checkpoint)
            files = sorted(str(path) for path in folder.rglob("*.distcp"))
        return fingerprint_files([os.path.join(self.hf_path, "config.json"), *files])


def starting_weights(plan: RunPlan) -> WeightsSource:
    """The weights that training starts from."""
    return WeightsSource(plan.settings.model.hf_path or "", plan.settings.model.checkpoint)


def history_weights(plan: RunPlan) -> WeightsSource:
    """The frozen weights that history is scored with: `history.hf_path`, or the starting weights."""
    return WeightsSource(plan.settings.history.hf_path) if plan.settings.history.hf_path else starting_weights(plan)


def history_model(plan: RunPlan, layout: Layout) -> Model:
    """The history model, without gradients, ready to score."""
    source = history_weights(plan)
    model = build_model(read_architecture(source.hf_path), plan.settings, layout, trainable=False)
    source.load(model)
    return model


def current_model(plan: RunPlan, layout: Layout, *, trainable: bool) -> Model:
    """The model of the run with its starting weights."""
    model = build_model(plan.architecture, plan.settings, layout, tapped_layers=plan.tapped_layers, trainable=trainable)
    starting_weights(plan).load(model)
    return model
