"""What the layers run on: Transformer Engine or torch, with which numerics, and what this machine lacks for it."""

import functools
import importlib.util
import os
import shutil
import sys
from typing import Any, Literal

import megatron.core
import torch

from megatron_sstoken.config import Settings, TrainingSettings
from megatron_sstoken.device import have_cuda
from megatron_sstoken.supported import TOKEN_MULTIPLE, fp8_problem, line_of

Backend = Literal["transformer_engine", "torch"]

# As Megatron-Bridge sets them: gradients in e5m2 where a scale covers a whole tensor, e4m3 where it covers a tile.
_FP8_FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@functools.lru_cache(maxsize=1)
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine's layers cannot run here, or None if they can."""
    if not have_cuda():
        return "this machine has no CUDA device (or SSTOKEN_DEVICE=cpu hides it)"
    if importlib.util.find_spec("transformer_engine") is None:
        return (
            "transformer_engine is not installed: python -m megatron_sstoken.doctor names the command that installs it"
        )
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version

    if not HAVE_TE:
        return "transformer_engine is installed but cannot be imported: python -c 'import transformer_engine.pytorch'"
    line = line_of(megatron.core.__version__, sys.version_info[:2])
    if not line.takes_transformer_engine(str(get_te_version())):
        return (
            f"transformer_engine {get_te_version()} is not one that megatron-core {megatron.core.__version__} takes: "
            f"install {line.transformer_engine_range}"
        )
    return None


def backend_of(settings: Settings) -> Backend:
    """What the layers of this run are made of. `auto` is Transformer Engine where it can run and has the precision."""
    wanted = preferred_backend(settings)
    if settings.model.backend != "auto" or settings.training.precision == "fp8":
        return wanted  # there is no other: where it cannot run, `machine_problems` says so
    return "torch" if wanted == "torch" or transformer_engine_problem() else "transformer_engine"


def passed_over(settings: Settings) -> str | None:
    """What a user of a GPU should know where `auto` could not take Transformer Engine: why, and what it costs."""
    wanted = preferred_backend(settings) == "transformer_engine" and settings.model.backend == "auto"
    reason = transformer_engine_problem() if wanted and have_cuda() else None
    return reason and (
        f"WARNING: the layers run on torch, which is slower on a GPU than Transformer Engine: {reason}; "
        "model.backend=torch says that this is meant"
    )


def preferred_backend(settings: Settings) -> Backend:
    """What the layers are made of on a machine on which Transformer Engine can run."""
    if settings.model.backend != "auto":
        return settings.model.backend
    return "torch" if settings.training.precision == "fp32" else "transformer_engine"


def machine_problems(settings: Settings) -> list[str]:
    """What these settings ask of the machine that it does not have."""
    training = settings.training
    missing = transformer_engine_problem()
    problems = []
    if settings.model.backend == "transformer_engine" and missing:
        problems.append(f"model.backend=transformer_engine cannot run: {missing}; or use auto or torch")
    if training.precision == "fp8":
        reason = missing or _gpu_problem(training.fp8_recipe)
        if reason:
            problems.append(
                f"training.precision=fp8 with training.fp8_recipe={training.fp8_recipe} cannot run: {reason}; "
                "or use training.precision=bf16"
            )
    optimizer = settings.optimizer
    wanted = {
        "optimizer.first_moment_dtype": (optimizer.first_moment_dtype, "fp32"),
        "optimizer.second_moment_dtype": (optimizer.second_moment_dtype, "fp32"),
        "optimizer.offload_fraction": (optimizer.offload_fraction, 0),
        "training.offload_layers": (training.offload_layers, 0),
    }
    for name, (value, plain) in wanted.items():
        if value != plain and missing:
            problems.append(f"{name}={value} needs Transformer Engine, which cannot run: {missing}; or use {plain}")
    if settings.model.compiled_head and (missing := compiler_problem()):
        problems.append(f"model.compiled_head=true cannot run: {missing}; or use compiled_head=false")
    return problems


def compiler_problem() -> str | None:
    """What torch.compile lacks here: Triton for GPUs, a C++ compiler for CPUs."""
    if have_cuda():
        return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
    wanted = os.environ.get("CXX")  # what torch's Inductor asks for first
    if any(shutil.which(name) for name in ([wanted] if wanted else ["g++", "clang++"])):
        return None
    return f"there is no C++ compiler ({wanted or 'g++ or clang++'}): install one"


def _gpu_problem(recipe: str) -> str | None:
    """Why this GPU or its CUDA version cannot compute a recipe."""
    problem = fp8_problem(recipe, torch.cuda.get_device_capability(), torch.version.cuda)
    return problem and f"{torch.cuda.get_device_name()} has {problem}"


def numerics_of(settings: Settings) -> str:
    """How the layers round, in words: precision, FP8 recipe and layers that are spared, and the backend if it is
    not torch. Losses compare closely only where it is equal."""
    training = settings.training
    text: str = training.precision
    if training.precision == "fp8":
        text += f" {training.fp8_recipe}"
        if training.fp8_first_bf16_layers or training.fp8_last_bf16_layers:
            text += f", first {training.fp8_first_bf16_layers} and last {training.fp8_last_bf16_layers} layers bf16"
    return text if backend_of(settings) == "torch" else f"{text} on transformer_engine"


def fp8_options(training: TrainingSettings) -> dict[str, Any]:
    """What megatron's TransformerConfig takes for FP8; empty otherwise."""
    if training.precision != "fp8":
        return {}
    return {
        "fp8": _FP8_FORMAT[training.fp8_recipe],
        "fp8_recipe": training.fp8_recipe,
        # Of the delayed recipe: the scale comes from the largest value of the last 1024 passes (Megatron-Bridge's choice).
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": training.fp8_first_bf16_layers + training.fp8_last_bf16_layers > 0,
        "num_layers_at_start_in_bf16": training.fp8_first_bf16_layers,
        "num_layers_at_end_in_bf16": training.fp8_last_bf16_layers,
    }


def fusion_options(
    backend: Backend, *, fused_activation: bool = True, fused_rope: bool = True, fused_biases: bool = True
) -> dict[str, bool]:
    """Which of megatron's fused kernels are there; `fused_activation`: whether there is one for the model's activation,
    `fused_rope`: for its RoPE, `fused_biases`: for adding outputs with their biases to the residual stream.

    `gradient_accumulation_fusion` is for megatron's own linears, and needs apex's extension. Transformer Engine's have their
    own (`accumulate_in_products`).
    """
    is_te = backend == "transformer_engine"
    extension = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {
        "gradient_accumulation_fusion": have_cuda() and extension,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": is_te and fused_activation,
        "bias_dropout_fusion": is_te and fused_biases,
        "persist_layer_norm": False,
        "apply_rope_fusion": is_te and fused_rope,
    }


def accumulate_in_products(module: torch.nn.Module) -> None:
    """Let Transformer Engine's linears under `module`, whose weights have megatron's `main_grad`, add their gradients to it
    within the matrix product: in fp32, without a temporary in the weights' type.

    megatron would ask for it with the option that its own vocabulary head answers with a demand for apex.
    """
    for linear in module.modules():
        if hasattr(linear, "fuse_wgrad_accumulation"):
            setattr(linear, "fuse_wgrad_accumulation", True)  # noqa: B010  (an attribute of Transformer Engine's)


def token_multiple(training: TrainingSettings) -> int:
    """What the tokens of a rank must be a multiple of for the numerics alone."""
    return TOKEN_MULTIPLE[training.fp8_recipe] if training.precision == "fp8" else 1
