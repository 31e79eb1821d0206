"""Token-selective supervised fine-tuning (ssToken, arXiv 2510.18250) on megatron-core."""

import warnings

__version__ = "0.1.0"

# What megatron-core says of itself at import and at run time, and no user of this package can act upon.
for _theirs in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    r"`torch\.distributed\..*` is deprecated",
    "When using async grad allreduce",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "TypedStorage is deprecated",
):
    warnings.filterwarnings("ignore", message=_theirs)
