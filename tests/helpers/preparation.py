"""Data preparation as tests run it."""

from typing import Any

from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.store import StoreManifest


def run(*arguments: Any, workers: int = 1, **options: Any) -> StoreManifest:
    """`prepare` in this process, without a progress bar."""
    return prepare(*arguments, workers=workers, progress=False, **options)
