"""The runs that sections measure: random models of real shapes, drawn data, and a trainer as a training run has it."""

import copy
import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from benchmarks.changes import apply
from benchmarks.drawn_history import DrawnHistory
from benchmarks.gpu.results import NotHere
from megatron_sstoken.checkpoint.weights_source import starting_weights
from megatron_sstoken.config import LoraSettings, Settings
from megatron_sstoken.data.batches import PackOrder, filter_samples
from megatron_sstoken.data.store import SampleStore, StoreWriter
from megatron_sstoken.device import have_cuda, synchronize
from megatron_sstoken.history.source import open_history
from megatron_sstoken.model.backend import backend_of, machine_problems
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.families import Architecture, parse_architecture, read_architecture
from megatron_sstoken.model.lora_targets import base_parameters
from megatron_sstoken.model.presets import model_config
from megatron_sstoken.parallel import create_layout, reset_layout, start_processes
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import StageMemory, memory_of
from megatron_sstoken.planner.workload import Workload
from megatron_sstoken.training.loop import Trainer, create_trainer
from megatron_sstoken.training.resume import resume_point
from megatron_sstoken.validate.run import plan_run

LENGTH = 4096
TINY_LENGTH = 128
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip
"""In place of a model's sizes; FP8's tiles divide them."""
SAMPLES = {"chat": (6.0, 0.8), "short": (5.2, 0.4)}
"""Mean and spread of the logarithm of a sample's length: chats of about 400 tokens with a long tail; GSM8K's of about 180."""
FULL = 0.92
"""Share of the device's memory that a model may plan to fill."""


def config_of(name: str, tiny: bool, layers: int | None = None, vocabulary: int | None = None) -> dict[str, Any]:
    """config.json of a model of the presets, with fewer layers or words, or with toy sizes."""
    if tiny:
        return model_config(name) | TINY
    changes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    return model_config(name) | {key: value for key, value in changes.items() if value is not None}


def architecture_of(name: str, tiny: bool) -> Architecture:
    """The architecture of `config_of`, with all layers."""
    return parse_architecture(config_of(name, tiny), name)


def write_model(folder: Path, config: dict[str, Any]) -> str:
    """A folder with config.json alone: the weights are drawn. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def write_data(folder: Path, kind: str, vocabulary: int, tiny: bool, rows: int) -> str:
    """Prepared data of random conversations of a `kind` of `SAMPLES`, of which 30 to 80 % are response, for about `rows` packs.

    Returns the folder, which is used again where it is there.
    """
    if folder.exists():
        return str(folder)
    generator = np.random.default_rng(0)
    writer = StoreWriter(folder)
    mean, spread = SAMPLES[kind]
    shorter = LENGTH // TINY_LENGTH if tiny else 1
    number, wanted = 0, 0.97 * rows * LENGTH // shorter
    while wanted > 0:
        length = max(int(np.clip(generator.lognormal(mean, spread), 32, LENGTH)) // shorter, 6)
        number, wanted = number + 1, wanted - length
        roles = np.ones(length, dtype=np.uint8)
        roles[: max(int(length * generator.uniform(0.2, 0.7)), 1)] = 0
        writer.add(generator.integers(0, vocabulary, length, dtype=np.int32), roles, number)
    writer.finalize(
        vocabulary_size=vocabulary, eos_token_id=0, tokenizer_fingerprint="drawn", tokenizer_path="none", template=None
    )
    return str(folder)


def settings_for(
    work: Path,
    name: str,
    *,
    tiny: bool,
    layers: int | None = None,
    vocabulary: int | None = None,
    kind: str = "chat",
    rows: int = 4,
    **changes: Any,
) -> Settings:
    """Settings of an ssToken run of a model of the presets in bf16; `changes` as `section__key=value`.

    An epoch is one global batch of about `rows` packs, the same every time: steps differ in nothing but what is switched.
    """
    rows = min(rows, 2) if tiny else rows
    config = config_of(name, tiny, layers, vocabulary)
    settings = Settings()
    settings.model.hf_path = write_model(work / f"{name}-{config['num_hidden_layers']}", config)
    words = config["vocab_size"]
    settings.data.train = write_data(work / f"{kind}-{words}-{rows}", kind, words, tiny, rows)
    settings.data.sequence_length, settings.data.shuffle = TINY_LENGTH if tiny else LENGTH, False
    settings.training.micro_batch_size = 1
    settings.training.global_batch_size = packs_of_an_epoch(settings)
    settings.training.steps = 1000
    return apply(settings, **changes)


def packs_of_an_epoch(settings: Settings) -> int:
    """How many packs the data makes where it is not shuffled."""
    length = settings.data.sequence_length
    samples = filter_samples(SampleStore(settings.data.train or ""), length, settings.data.too_long)
    return PackOrder(samples, seed=0, shuffle=False, packing="first_fit", capacity=length).num_packs(1)


def make_trainer(settings: Settings, *, scored: bool = False) -> Trainer:
    """A trainer of a run with these settings, in the place of any other one.

    History losses are drawn, or with `scored` those of the history model, as in a real run. Weights are those of
    `model.hf_path`, or drawn where it has none. Raises NotHere where the machine cannot run it.
    """
    if problems := machine_problems(settings):
        raise NotHere("; ".join(problems))
    settings = copy.deepcopy(settings)  # what is switched while it is measured ends with the trainer
    start_processes()
    release_memory()
    plan = plan_run(settings, 1, dry_run=True)  # a dry run: weights may be missing
    layout = create_layout(settings.parallel, settings.training.seed)
    resume = resume_point(plan, layout)
    plan = resume.plan
    model = build_model(plan.architecture, settings, layout, captured_layers=plan.captured_layers, trainable=True)
    if has_weights(settings):
        starting_weights(settings).load(model)
    else:
        draw_weights(model)
        # Whose adapters they are only files could tell; it is asked for when they are saved.
        plan = replace(plan, settings=replace(settings, lora=LoraSettings()))
    history = open_history(plan, layout) if scored else DrawnHistory()
    trainer = create_trainer(plan, layout, model, history, resume=resume)
    trainer.model.train(True)
    return trainer


def has_weights(settings: Settings) -> bool:
    """Whether the model's folder has more than config.json."""
    return any(Path(settings.model.hf_path or "").glob("*.safetensors"))


def draw_weights(model: Model) -> None:
    """Weights as those of a fresh model: losses start near log(vocabulary)."""
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in model.unwrapped:
            for name, parameter in base_parameters(chunk):
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(std=0.02)


def release_memory() -> None:
    """Let go of process groups and of the memory of models that nobody holds any more."""
    if dist.is_initialized():
        reset_layout()
    # Its cache holds the module, whose hook for parameters that are gathered late holds the whole model.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    if have_cuda():
        synchronize()
        torch.cuda.empty_cache()


def device_bytes() -> float:
    """Memory of the device: the GPU's, or this machine's."""
    if have_cuda():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def planned_memory(settings: Settings, architecture: Architecture | None = None) -> StageMemory:
    """What the planner says that a run on one device holds at its peak."""
    architecture = architecture or read_architecture(settings.model.hf_path or "")
    workload = replace(Workload.of_settings(settings, architecture, 1), backend=backend_of(settings))
    return memory_of(workload, Assumptions())[0]


def layers_that_fit(settings: Settings, architecture: Architecture) -> int:
    """The largest number of layers, up to the model's own, with which a run fits this device by the planner; 0: none."""
    limit = FULL * device_bytes()
    for layers in range(architecture.num_layers, 0, -1):
        if planned_memory(settings, with_layers(architecture, layers)).total <= limit:
            return layers
    return 0


def with_layers(architecture: Architecture, layers: int) -> Architecture:
    """The same with its first layers alone."""
    kinds = {name: getattr(architecture, name)[:layers] for name in ("windowed_layers", "delta_layers")}
    return replace(architecture, num_layers=layers, **kinds)
