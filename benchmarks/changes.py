"""Settings changed by name, for runs that are measured or tested."""

from typing import Any

from megatron_sstoken.config import Settings


def apply(settings: Settings, **changes: Any) -> Settings:
    """`settings`, changed: dotted settings with `__` for the dot, or a mapping as `**{...}`."""
    for name, value in changes.items():
        section, key = name.replace("__", ".").split(".")
        assert hasattr(getattr(settings, section), key), name
        setattr(getattr(settings, section), key, value)
    return settings
