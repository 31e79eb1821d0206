"""What differs between the supported lines of megatron-core, each with its reason. What both have is used directly.

`supported.py` names the lines; `device.py` adapts either to machines without CUDA.
"""

import functools
import logging

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

_UNWANTED = {
    # GPTModel gets no new features. 0.16 has no HybridModel that could take its place; see docs/platform.md.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # The wrapper works out the layout of its buffers as the caller could have done, which 0.16 cannot.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""Logger of 0.19 → how the message begins that it writes for every chunk of every run, and that a user cannot act on."""


@functools.lru_cache(maxsize=1)
def silence_announcements() -> None:
    """Keep what 0.19 announces about its own future out of the output of runs."""
    for logger, beginning in _UNWANTED.items():
        logging.getLogger(logger).addFilter(functools.partial(_begins_otherwise, beginning))


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def dense_mlp(layer: TransformerLayerSubmodules) -> MLPSubmodules | None:
    """What the feed-forward part of a layer's spec is made of, to be changed in place; None for a mixture of experts.

    0.16 describes it by a ModuleSpec, 0.19 by a partial function that builds it.
    """
    described = layer.mlp.keywords if isinstance(layer.mlp, functools.partial) else vars(layer.mlp)
    submodules = described.get("submodules")
    return submodules if isinstance(submodules, MLPSubmodules) else None
