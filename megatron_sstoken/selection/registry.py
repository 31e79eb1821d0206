"""Entries of a registry by name, and those of a user's own package by import path."""

import importlib
from collections.abc import Mapping
from typing import TypeVar

from megatron_sstoken.words import did_you_mean

Entry = TypeVar("Entry")


def named(setting: str, name: str, registry: Mapping[str, Entry], kind: type[Entry]) -> Entry:
    """The entry of `registry`, or the `kind` that a dotted name imports (`my_package.my_module.my_entry`).

    Raises ValueError where there is none; `setting`: what messages call it.
    """
    if name in registry:
        return registry[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"{setting}={name} is unknown: {did_you_mean(name, registry)}use one of {', '.join(registry)}, or the import path "
            f"of a {kind.__name__} of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"{setting}={name} cannot be imported ({error}): put its package on PYTHONPATH") from error
    except Exception as error:  # whatever a user's module raises when it runs
        raise ValueError(f"{setting}={name} cannot be imported: mend {module}: {error!r}") from error
    if found is None:
        raise ValueError(f"{setting}={name} does not exist: name a {kind.__name__} that {module} defines, after a dot")
    if not isinstance(found, kind):
        raise ValueError(
            f"{setting}={name} is a {type(found).__name__}: name a {kind.__name__}, as made by "
            f"{kind.__module__}.{kind.__name__}(…)"
        )
    return found
