"""The identity of history losses, and where they lie."""

import dataclasses
from pathlib import Path

import pytest

from megatron_sstoken.data.column import describe_mismatch
from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.history.frozen import history_identity, history_path

MANIFEST = StoreManifest(
    data_fingerprint="d" * 64,
    tokenizer_fingerprint="t" * 64,
    template_fingerprint="c" * 64,
    num_samples=10,
    num_tokens=100,
    num_response_tokens=50,
    num_skipped=0,
    longest_sample=20,
    vocabulary_size=99,
    eos_token_id=1,
    template="",
    template_source="",
    tokenizer_path="toy",
)
FACTS = {"weights_fingerprint": "w" * 64, "precision": "bf16", "scored_length": 20}
DATA = Path("/somewhere/data")

# ingredient → changes of the manifest, changes of the other facts
CHANGES = {
    "data": ({"data_fingerprint": "e" * 64}, {}),
    "tokenizer": ({"tokenizer_fingerprint": "u" * 64}, {}),
    "template": ({"template_fingerprint": "f" * 64}, {}),
    "weights": ({}, {"weights_fingerprint": "x" * 64}),
    "precision": ({}, {"precision": "fp32"}),
    "scored_length": ({}, {"scored_length": 19}),
}


def identity_with(manifest_changes=None, fact_changes=None):
    manifest = dataclasses.replace(MANIFEST, **(manifest_changes or {}))
    return history_identity(manifest, **(FACTS | (fact_changes or {})))


@pytest.mark.parametrize("name", CHANGES)
def test_every_ingredient_counts_and_is_named(name):
    changed = identity_with(*CHANGES[name])
    mismatch = describe_mismatch(identity_with(), changed)
    assert mismatch is not None and mismatch.startswith(f"{name} is ") and ";" not in mismatch
    assert history_path(DATA, changed) != history_path(DATA, identity_with())


def test_all_identities_have_their_own_folders():
    paths = {history_path(DATA, identity_with(*change)) for change in CHANGES.values()}
    assert len(paths | {history_path(DATA, identity_with())}) == len(CHANGES) + 1


def test_what_does_not_change_the_losses_does_not_count():
    renamed = identity_with({"tokenizer_path": "elsewhere", "num_skipped": 3, "sources": [{"path": "a.jsonl"}]})
    assert renamed == identity_with()


def test_the_path_is_stable():
    """The same everywhere and in every version: stores that exist must be found again."""
    identity = identity_with()
    assert history_path(DATA, identity) == history_path(DATA, dict(reversed(identity.items())))
    assert history_path(DATA, identity) == "/somewhere/data/history/be1b569d10654296"
    version_1 = identity | {"num_scored": 10}
    assert history_path(DATA, version_1) == "/somewhere/data/history/fb8c53d8eacaa0c9"
