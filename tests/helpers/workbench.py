"""Tiny models, prepared data and settings that integration tests share."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.stand_ins import SHAPE, VOCABULARY, make_conversations, make_settings, make_store, save_random_model
from megatron_sstoken.config import Settings
from megatron_sstoken.model.families import family_names, family_of, read_architecture
from tests.reference.hf_reference import Sample

__all__ = ["VOCABULARY", "make_settings", "make_store"]  # for tests, which find here what a tiny run needs
FAMILIES = family_names()
EVERYWHERE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3")
"""Families that every run of the tests looks at on all layouts; what others do on layouts, slow tests look at."""
PARTICULAR = ("deepseek_v3", "gemma3_text", "glm4_moe", "gpt_oss", "olmo3", "qwen3_5_text", "qwen3_next")
"""Of the others those that are looked at on one layout, with tensor and pipeline parallel."""
MIXTURES = tuple(name for name in FAMILIES if family_of(name).experts)


def tiny_config(family: str, **changes: Any) -> Any:
    """transformers' configuration of a miniature: 4 layers with grouped queries, and what is particular to the family."""
    return AutoConfig.for_model(family, **(SHAPE | family_of(family).tiny | changes))


def make_model(folder: str | Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> str:
    """Save a random Hugging Face model of `tiny_config`; returns its folder."""
    return save_random_model(folder, tiny_config(family, **changes), seed=seed)


def load_model(folder: str | Path) -> Any:
    """The model of a folder as the reference wants it: eager attention, fp32, evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager", dtype=torch.float32).eval()


def part_name(name: str, part: int | None) -> str:
    """What comparisons call a part of a tensor of all experts."""
    return name if part is None else f"{name}.{part}"


def names_on_disk(folder: str | Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters (or gradients) of transformers' model, as its folder names and cuts them.

    transformers holds the experts of a layer in two tensors and saves them one by one, in some families as they are; router
    and experts may have another name in the file.
    """
    of_folder = read_architecture(str(folder)).weight_rules()
    rules = {rule.megatron: rule.hugging_face for rule in of_folder}
    stacks = {name for rule in of_folder if rule.stacked for name in rule.hugging_face}
    found = {}
    for name, value in parameters.items():
        _, _, kind = name.partition(".mlp.experts.")
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        block = "decoder.layers.{layer}.mlp."
        if layer and name.replace(f".{layer}.", ".{layer}.", 1) in stacks:
            found |= {part_name(name, expert): part for expert, part in enumerate(value)}
            continue
        if not kind:
            router = name.endswith(".mlp.gate.weight")
            found[rules[block + "router.weight"][0].format(layer=layer) if router else name] = value
            continue
        for expert, part in enumerate(value):
            linear = "linear_fc1" if kind == "gate_up_proj" else "linear_fc2"
            names = rules[f"{block}experts.local_experts.{expert}.{linear}.weight"]
            pieces = part.chunk(len(names))
            found |= {one.format(layer=layer): piece for one, piece in zip(names, pieces, strict=True)}
    return found


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
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.training.known import open_known
    from megatron_sstoken.training.loop import create_trainer, model_to_train
    from megatron_sstoken.training.resume import resume_point
    from megatron_sstoken.validate.agree import agreed_plan

    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, settings.training.seed)
    resume = resume_point(plan, layout)
    history = open_history(resume.plan, layout)
    known = open_known(resume.plan, layout, history)
    model = model_to_train(resume.plan, layout)
    trainer = create_trainer(resume.plan, layout, model, history, known=known, resume=resume)
    trainer.model.train(True)
    return trainer


def go_on(trainer: Any, saved_at: tuple[int, ...]) -> list[float]:
    """On each rank: train to the end, and save after the steps `saved_at`; each step's loss."""
    from megatron_sstoken.training.loop import save, training_step

    losses = []
    for number in range(trainer.step, trainer.plan.num_steps):
        losses.append(training_step(trainer, number)[0].loss_selected)
        trainer.step = number + 1
        if trainer.step in saved_at:
            save(trainer)
    return losses


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
