"""Where history losses come from: what they were made of, and where they lie."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_sstoken.data.store import StoreManifest


def history_identity(
    manifest: StoreManifest, *, weights_fingerprint: str, precision: str, scored_length: int, num_scored: int
) -> dict[str, Any]:
    """Everything that history losses depend on; a store is used only where all of it is equal.

    `scored_length`: tokens after which samples were cut; `num_scored`: samples not left out for their length.
    """
    return {
        "data": manifest.data_fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "template": manifest.template_fingerprint,
        "weights": weights_fingerprint,
        "precision": precision,
        "scored_length": scored_length,
        "num_scored": num_scored,
    }


def history_path(data: Path, identity: dict[str, Any]) -> str:
    """Default folder of a history store: beside the data, named by its identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return str(data / "history" / digest[:16])
