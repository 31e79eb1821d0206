"""Model families: what a Hugging Face config.json means, and which tensors make which megatron parameter.

A family is one module of this package, which declares a `Family` and registers it. A configuration field that would change
what the model computes and is not understood is an error that names it.
"""

import importlib
import pkgutil

from megatron_sstoken.model.families.architecture import Architecture, DeltaNet, Latents, RopeScaling
from megatron_sstoken.model.families.reading import parse_architecture, read_architecture
from megatron_sstoken.model.families.registry import Experts, Family, family_names, family_of, register
from megatron_sstoken.model.families.rope import rope_inverse_frequencies, table_frequencies
from megatron_sstoken.model.families.weight_map import Split, WeightRule

__all__ = [
    "Architecture",
    "DeltaNet",
    "Experts",
    "Family",
    "Latents",
    "RopeScaling",
    "Split",
    "WeightRule",
    "family_names",
    "family_of",
    "parse_architecture",
    "read_architecture",
    "register",
    "rope_inverse_frequencies",
    "table_frequencies",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
