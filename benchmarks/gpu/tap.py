"""The tap: the attention mass on the context that the layer's own kernel computes, against a dense reference in fp64."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import get_fp8_context

from benchmarks.gpu.results import Results
from benchmarks.gpu.runs import release_memory
from megatron_sstoken.config import Settings
from megatron_sstoken.device import compute_device
from megatron_sstoken.model.attention import sample_bounds
from megatron_sstoken.model.backend import backend_of, machine_problems, numerics_of
from megatron_sstoken.model.build import build_model
from megatron_sstoken.model.families import Architecture, parse_architecture
from megatron_sstoken.parallel import create_layout, start_processes

LENGTHS = (384, 640, 96, 1, 927)
"""Samples of a pack."""
NUMERICS: tuple[dict[str, str], ...] = (
    {"precision": "fp32"},
    {"precision": "bf16", "backend": "torch"},
    {"precision": "bf16", "backend": "transformer_engine"},
    {"precision": "fp8", "fp8_recipe": "tensorwise"},
    {"precision": "fp8", "fp8_recipe": "blockwise"},
    {"precision": "fp8", "fp8_recipe": "delayed"},
)
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 1e-2), "fp8": (1e-2, 1e-2)}
"""Largest difference of the mass (of 1), mean over heads; norm of the difference of the output ÷ its norm. Attention is
computed in bf16 also where the layers' products are in FP8."""


@dataclass(frozen=True)
class Shape:
    """What attends to what."""

    name: str
    groups: int
    head_dim: int
    window: int | None = None
    heads: int = 8


SHAPES = (
    Shape("every head its keys, 64", 8, 64),
    Shape("grouped queries, 128", 2, 128),
    Shape("grouped queries, 128, window of 100", 2, 128, window=100),
)


class Messages(logging.Handler):
    """Collects what Transformer Engine says about the attention backend: a line whenever it chooses anew."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Running with") and "config" not in text:
            self.found.append(text.removeprefix("Running with "))


def run(results: Results) -> None:
    """Every numerics that this machine has, on every shape."""
    messages = Messages()
    logging.getLogger("DotProductAttention").addHandler(messages)
    start_processes()
    for choice in NUMERICS:
        settings = _settings(choice)
        if problems := machine_problems(settings):
            results.absent(" ".join(choice.values()), "; ".join(problems))
            continue
        for shape in SHAPES:
            case = f"{numerics_of(settings)}, {shape.name}"
            with results.attempt(case):
                mass, output = _errors(settings, shape, results.tiny)
                backend = "torch scaled_dot_product_attention"
                if backend_of(settings) == "transformer_engine":
                    backend = messages.found[-1] if messages.found else "not said"
                results.row("attention backend", case=case, backend=backend)
                mass_bound, output_bound = BOUNDS[settings.training.precision]
                results.check(f"{case}: largest difference of the mass", mass, mass_bound)
                results.check(f"{case}: relative difference of the output", output, output_bound)


def _settings(choice: dict[str, str]) -> Settings:
    settings = Settings()
    backend: Any = choice.get("backend", "auto")
    precision: Any = choice["precision"]
    recipe: Any = choice.get("fp8_recipe", settings.training.fp8_recipe)
    settings.model = replace(settings.model, backend=backend, hf_path="drawn")
    settings.training = replace(settings.training, precision=precision, fp8_recipe=recipe)
    return settings


def architecture_of(shape: Shape) -> Architecture:
    """One layer of a Mistral, the family that has windows."""
    kind: Literal["mistral"] = "mistral"
    config = {
        "model_type": kind, "architectures": ["MistralForCausalLM"], "vocab_size": 512, "num_hidden_layers": 1,
        "hidden_size": shape.heads * shape.head_dim, "intermediate_size": 512, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups, "head_dim": shape.head_dim, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "sliding_window": shape.window,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return parse_architecture(config, shape.name)


def _errors(settings: Settings, shape: Shape, tiny: bool) -> tuple[float, float]:
    """Of the mass the largest absolute difference to the reference, of the output the relative one."""
    release_memory()
    layout = create_layout(settings.parallel, 0)
    model = build_model(architecture_of(shape), settings, layout, captured_layers=(1,), trainable=False)
    model.train(False)
    attention = model.unwrapped[0].decoder.layers[0].self_attention
    lengths = [max(length // 8, 1) if tiny else length for length in LENGTHS]
    total, device = sum(lengths), compute_device()
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        values = torch.randn(total, heads, shape.head_dim, generator=generator) * 2  # peaked: some keys get most
        return values.to(model.config.params_dtype).to(device)

    query, key, value = draw(shape.heads), draw(shape.groups), draw(shape.groups)
    context = (torch.rand(total, generator=generator) < 0.4).to(device)
    model.captures[0].arm(context)
    fp8 = get_fp8_context(model.config) if model.config.fp8 else nullcontext()
    with torch.no_grad(), fp8:
        output = attention.core_attention(
            query, key, value, None, attn_mask_type=attention.attn_mask_type,
            packed_seq_params=sample_bounds(lengths),
        )  # fmt: skip
    mass = model.captures[0].take()[1] / shape.heads
    wanted_mass, wanted = dense_reference(query, key, value, context, lengths, shape.window)
    difference = (mass.double() - wanted_mass).abs().max().item()
    return difference, ((output.double() - wanted).norm() / wanted.norm()).item()


def dense_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: torch.Tensor,
    lengths: list[int],
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass on the context, mean over heads [T], and output [T, heads · head_dim], sample by sample with all scores in fp64."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(repeats, 1), value.double().repeat_interleave(repeats, 1)
    masses, outputs, start = [], [], 0
    for length in lengths:
        part = slice(start, start + length)
        place = torch.arange(length, device=query.device)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind < (window or length))
        scores = torch.einsum("ihd,jhd->hij", q[part], k[part]) / q.shape[2] ** 0.5
        share = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        masses.append((share * context[part].double()).sum(-1).mean(0))
        outputs.append(torch.einsum("hij,jhd->ihd", share, v[part]).flatten(1))
        start += length
    return torch.cat(masses), torch.cat(outputs)
