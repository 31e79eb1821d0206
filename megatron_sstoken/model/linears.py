"""Linears of attention layers of our own, megatron's or Transformer Engine's, split by heads."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module

LinearMaker = Callable[..., torch.nn.Module]
"""Makes a linear of its numbers of inputs and outputs; it returns its output and no bias."""


def column_parallel(
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
    make: LinearMaker,
    num_inputs: int,
    num_outputs: int,
    *,
    name: str,
) -> torch.nn.Module:
    """A linear without bias, each tensor parallel rank making its part of the outputs."""
    split = {"gather_output": False, "bias": False, "skip_bias_add": False, "init_method": config.init_method}
    return make(num_inputs, num_outputs, tp_comm_buffer_name=name, **_common(config, tp_group), **split)


def row_parallel(
    config: TransformerConfig, tp_group: dist.ProcessGroup, kind: type | ModuleSpec, num_inputs: int, num_outputs: int
) -> torch.nn.Module:
    """The projection of attention's output, of which each tensor parallel rank has its part of the inputs."""
    split = {"input_is_parallel": True, "bias": config.add_bias_linear, "skip_bias_add": True}
    split["init_method"] = config.output_layer_init_method
    return build_module(kind, num_inputs, num_outputs, tp_comm_buffer_name="proj", **_common(config, tp_group), **split)


def _common(config: TransformerConfig, tp_group: dist.ProcessGroup) -> dict[str, Any]:
    return {"config": config, "is_expert": False, "tp_group": tp_group}
