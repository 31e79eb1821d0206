"""What megatron's optimizer is told to hold in which format, and where."""

import sys
import types
from dataclasses import fields

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, optimizer_config

from megatron_sstoken.config import OptimizerSettings
from megatron_sstoken.model.optimizer import memory_options


class FusedAdam:
    """Transformer Engine's AdamW, as far as megatron looks at it."""

    def __init__(self, params, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad):
        pass


@pytest.fixture
def transformer_engine(monkeypatch):
    """As if it were installed."""
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda *version: True)
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]


def config_of(**settings) -> OptimizerConfig:
    options = memory_options(OptimizerSettings(**settings))
    assert options.keys() <= {field.name for field in fields(OptimizerConfig)}
    return OptimizerConfig(optimizer="adam", bf16=True, use_distributed_optimizer=True, **options)


def test_by_default_megatron_is_told_nothing():
    assert memory_options(OptimizerSettings()) == memory_options(OptimizerSettings(gradient_dtype="bf16")) == {}


def test_moments_in_other_formats_are_the_precision_aware_optimizer(transformer_engine):
    config = config_of(first_moment_dtype="fp8", second_moment_dtype="bf16")
    assert config.use_precision_aware_optimizer and not config.optimizer_cpu_offload
    assert (config.exp_avg_dtype, config.exp_avg_sq_dtype) == (torch.uint8, torch.bfloat16)
    assert not config.store_param_remainders and config.main_params_dtype == torch.float32


def test_state_in_the_hosts_memory(transformer_engine):
    config = config_of(offload_fraction=0.75)
    assert config.optimizer_cpu_offload and config.optimizer_offload_fraction == 0.75
    assert config.use_precision_aware_optimizer and config.exp_avg_dtype == torch.float32
