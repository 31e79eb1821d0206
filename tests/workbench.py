"""Tiny models, prepared data and settings that integration tests share."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from benchmarks.stand_ins import VOCABULARY, make_conversations, make_settings, make_store, save_random_model
from megatron_sstoken.config import Settings
from tests.reference.hf_reference import Sample

__all__ = ["VOCABULARY", "make_settings", "make_store"]  # for tests, which find here what a tiny run needs
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
"""Configuration class and what is particular: rope scaling, tied embeddings, windows, heads wider than hidden ÷ heads."""


def make_model(folder: str | Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> str:
    """Save a random Hugging Face model of 4 layers with grouped queries; returns its folder.

    Biases and norms are not what they are initialised to.
    """
    config_class, particular = FAMILIES[family]
    return save_random_model(folder, config_class, seed=seed, **(particular | changes))


def load_model(folder: str | Path) -> Any:
    """The model of a folder as the reference wants it: eager attention, fp32, evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager", dtype=torch.float32).eval()


def make_samples(num: int, *, seed: int = 0, longest: int = 60, shortest: int = 8) -> list[Sample]:
    """Random conversations, single- and multi-turn; every one begins with context and has a response."""
    return [Sample(*one) for one in make_conversations(num, seed=seed, longest=longest, shortest=shortest)]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2-sequence": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2-vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "dp2": (2, {}),
}
"""Name → number of processes and the settings that make the layout."""


def run_score(rank: int, settings: list[Settings], outputs: list[str]) -> None:
    """On each rank: write token records for several settings that share a layout."""
    from megatron_sstoken import score
    from megatron_sstoken.parallel import reset_layout

    for one, output in zip(settings, outputs, strict=True):
        score.run(one, output)
        reset_layout()


def make_trainer(settings: Settings) -> Any:
    """On each rank: plan, layout, history and model of a run, as `megatron_sstoken.train` puts them together."""
    from megatron_sstoken.checkpoint.weights_source import model_to_train
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.passes.scoring import open_history
    from megatron_sstoken.training.loop import create_trainer
    from megatron_sstoken.validate.agree import agreed_plan

    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, settings.training.seed)
    history = open_history(plan, layout)
    trainer = create_trainer(plan, layout, model_to_train(plan, layout, trainable=True), history)
    trainer.model.train(True)
    return trainer


def run_training(rank: int, settings: list[Settings]) -> list[list[dict[str, float]]]:
    """On each rank: train with several settings that share a layout; each step's loss, gradient norm and counts."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import training_step

    results = []
    for one in settings:
        trainer = make_trainer(one)
        steps = []
        for number in range(trainer.plan.num_steps):
            metrics, norm, _ = training_step(trainer, number)
            steps.append(
                {
                    "loss": metrics.loss_selected,
                    "grad_norm": norm,
                    "num_selected": metrics.num_selected,
                    "num_response": metrics.num_response,
                }
            )
        results.append(steps)
        reset_layout()
    return results
