"""Brings the attention masses of all captured layers to the last model chunk, where the losses are.

A layer may lie on an earlier chunk than the losses. Its mass, one fp32 a token, then travels with the activations, in rows
behind theirs: in the schedule's own messages, which come in order and are never more than the schedule has room for.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_sstoken.model.build import Model


@dataclass(frozen=True)
class MassTransport:
    """How masses of micro-batches with `num_tokens` tokens a context parallel rank travel; masses are fp32 [num_tokens]."""

    model: Model
    num_tokens: int

    @cached_property
    def num_rows(self) -> int:
        """Rows of hidden states that a micro-batch's masses fill; 0 where all are measured in the last chunk."""
        layout = self.model.layout
        if layout.pipeline_size == 1 or not self.model.captured_layers:
            return 0
        config = self.model.config
        vp_stage = layout.virtual_pipeline - 1 if layout.virtual_pipeline > 1 else None
        in_last = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pipeline_size - 1)
        if min(self.model.captured_layers) > config.num_layers - in_last:
            return 0
        row_bytes = config.hidden_size * config.pipeline_dtype.itemsize
        return -(-4 * self.num_tokens // row_bytes)

    @property
    def num_positions(self) -> int:
        """By how many tokens the schedule must believe micro-batches longer, so that its messages hold the rows.

        It divides tokens over the context parallel ranks, and over the tensor ranks under sequence parallel; each rank brings
        the sums over its own heads.
        """
        if not self.num_rows:
            return 0
        layout = self.model.layout
        sequence_ranks = layout.tensor_size if self.model.config.sequence_parallel else 1
        return self.num_rows * layout.context_size * sequence_ranks

    def unload(self, chunk: int) -> torch.Tensor | None:
        """Take the masses of earlier chunks off what model chunk `chunk` was sent, before it runs; None if there are none."""
        if not self.num_rows or (block := self.model.unwrapped[chunk].decoder).pre_process:
            return None
        received = block.input_tensor
        block.set_input_tensor(received[: -self.num_rows])
        return received[-self.num_rows :].detach().reshape(-1).view(torch.float32)[: self.num_tokens]

    def load(self, chunk: int, output: torch.Tensor, mass: torch.Tensor | None) -> torch.Tensor:
        """Put the masses so far behind the output of model chunk `chunk`, for the next one; the last keeps its output."""
        if not self.num_rows or self.model.unwrapped[chunk].decoder.post_process:
            return output
        rows = output.new_zeros(self.num_rows, *output.shape[1:])
        if mass is not None:
            rows.view(-1).view(torch.float32)[: self.num_tokens] = mass
        return torch.cat([output, rows])


def total_mass(earlier: torch.Tensor | None, captured: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """Masses of earlier chunks and of a chunk's own layers, summed; fp32 [tokens], None if there are none."""
    masses = [*captured.values()] if earlier is None else [earlier, *captured.values()]
    return torch.stack(masses).sum(dim=0) if masses else None


def mean_mass(model: Model, total: torch.Tensor) -> torch.Tensor:
    """In the last chunk: the sums over this rank's heads → the mean over all query heads and captured layers, fp32 [tokens].

    The same on all ranks of the tensor parallel group, who all call it.
    """
    dist.all_reduce(total, group=model.layout.groups.tp)
    return total / (model.architecture.num_attention_heads * len(model.captured_layers))
