"""What a model is, told without its files' bytes: its architecture, and a digest of the numbers of each of its parts.

Adapters remember it of their base. Equal for a config.json that was written anew, for other cuts into files, and for the same
numbers in another type; different for other numbers.
"""

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights

_PART = re.compile(r"(model\.layers\.\d+)\..*")
_NUM_READ = 1 << 26
"""Numbers of a model that are read; smaller models are read whole."""
_LEAST = 1 << 12
"""Numbers of a tensor that are read at least."""
_RANGE = 1 << 14
"""Numbers that are read in one go, where that leaves more than one range of a tensor."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is. JSON holds it as it is."""

    architecture: dict[str, Any]
    """The fields of `Architecture` that differ from their defaults (`told`)."""
    weights: dict[str, str]
    """Part of the model (a layer, or a tensor outside of them; a file of a checkpoint) → digest of its numbers."""

    def differences(self, other: "ModelIdentity") -> list[str]:
        """What differs between this model, as it was, and another, as it is; for people, the architecture first."""
        before, now = self.architecture, other.architecture
        found = []
        for name in dict.fromkeys([*before, *now]):
            default = told(getattr(Architecture, name, None))
            old, new = before.get(name, default), now.get(name, default)
            if old != new:
                found.append(f"{name} was {old} and is {new}")
        names = dict.fromkeys([*self.weights, *other.weights])
        if parts := [name for name in names if self.weights.get(name) != other.weights.get(name)]:
            more = f" and {len(parts) - 2} more of {len(names)} parts" if len(parts) > 2 else ""
            found.append(f"other numbers in {', '.join(parts[:2])}{more}")
        return found


def told(value: Any) -> Any:
    """An architecture as JSON holds it, without fields that have their default: what later versions add is not missed."""
    if is_dataclass(value):
        fields_of = {field.name: (field.default, getattr(value, field.name)) for field in fields(value)}
        return {name: told(one) for name, (default, one) in fields_of.items() if one != default}
    return [told(one) for one in value] if isinstance(value, tuple) else value


def weight_digests(tensors: HuggingFaceWeights, architecture: Architecture) -> dict[str, str]:
    """`ModelIdentity.weights` of a Hugging Face folder: sha256 over names, shapes and numbers (as fp32), by part.

    Of models above 64 million numbers every tensor gives an equal share of about so many, in ranges spread evenly from its
    first number to its last. What changes weights everywhere shows (training, merged adapters, another quantisation); an edit
    of some rows may not. So 140 GB take hardly longer than 0.2 GB.
    """
    names = architecture.tensor_names()
    shapes = {name: list(tensors.slice(name).get_shape()) for name in names}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    share = max(sizes.values()) if sum(sizes.values()) <= _NUM_READ else max(_NUM_READ // len(names), _LEAST)
    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    with tensors.read_numbers() as read:
        for name, size in sizes.items():
            digest = digests[_PART.sub(r"\1", name)]
            digest.update(f"{name}\0{shapes[name]}\0".encode())
            for first, last in _ranges(size, share):
                digest.update(read(name, first, last).float().numpy().data)
    return {part: digest.hexdigest()[:32] for part, digest in digests.items()}


def _ranges(size: int, share: int) -> list[tuple[int, int]]:
    """About `share` of the numbers 0 to `size`, as (first, last + 1)."""
    if size <= share:
        return [(0, size)]
    count = max(2, share // _RANGE)
    width = share // count
    starts = [(size - width) * number // (count - 1) for number in range(count)]
    return [(start, start + width) for start in starts]
