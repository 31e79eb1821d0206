"""How large the checkpoints of a run are, and how long it takes to write one: worked out before anything is built."""

import math

from megatron_sstoken.config import Settings
from megatron_sstoken.files import format_bytes
from megatron_sstoken.model.dtypes import weight_dtype
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.lora_places import num_adapter_parameters, num_whole_tables

OPTIMIZER_BYTES = 12
"""Of each trained parameter: its fp32 copy and two moments, in fp32 whatever the run keeps them in."""
COPY_BYTES = 4
"""Of each trained parameter in a copy of the weights that history losses are scored with: fp32."""
NODE_SPEED = 2e9
"""Bytes a second that a node is assumed to write: half of what four NVMe drives or a share of a parallel file system give."""
NODE_PROCESSES = 8
"""Processes that a node is assumed to have."""


def checkpoint_bytes(a: Architecture, settings: Settings, *, with_copy: bool = False) -> int:
    """Bytes of one checkpoint: what is trained, in the run's type, and the optimizer's state of it.

    `with_copy`: and a copy of it in fp32, with which history losses are scored.

    Every tensor is stored once, however many ranks hold it: of the layout the tensor parallel size alone matters, to which
    the vocabulary is padded. Descriptions come on top, some kilobytes for each tensor.
    """
    width = weight_dtype(settings.training.precision).itemsize
    return trained_parameters(a, settings) * (width + OPTIMIZER_BYTES + (COPY_BYTES if with_copy else 0))


def trained_parameters(a: Architecture, settings: Settings) -> int:
    """Parameters that a run trains, those of the padded vocabulary among them."""
    padded = a.padded_vocabulary(settings.model.vocabulary_multiple, settings.parallel.tensor)
    if settings.lora.rank:
        whole = num_whole_tables(a, settings.lora) * a.hidden_size * padded
        return num_adapter_parameters(a, settings.lora) + whole
    tables = 1 if a.tied_embeddings else 2
    return a.num_parameters() + tables * a.hidden_size * (padded - a.vocabulary_size)


def describe_checkpoint(a: Architecture, settings: Settings, world_size: int, *, with_copy: bool = False) -> str:
    """Size of one checkpoint and seconds to write it, for people."""
    size, nodes = checkpoint_bytes(a, settings, with_copy=with_copy), math.ceil(world_size / NODE_PROCESSES)
    meanwhile = "while training goes on" if settings.checkpoint.asynchronous else "while training waits"
    return (
        f"{format_bytes(size)}, about {max(size / (nodes * NODE_SPEED), 0.1):,.1f} s to write at {NODE_SPEED / 1e9:g} GB/s a "
        f"node, {meanwhile}"
    )
