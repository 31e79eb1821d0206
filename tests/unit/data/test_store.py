"""Prepared folders on disk."""

import json

import numpy as np
import pytest

from megatron_sstoken.data.store import (
    SampleStore,
    StoreManifest,
    StoreWriter,
)

SAMPLES = [([5, 6, 7], [0, 1, 1]), ([1], [1]), ([2, 3, 4, 9], [0, 0, 1, 0])]


def write_store(path, samples=SAMPLES, vocabulary_size=10):
    with StoreWriter(path) as writer:
        for row, (tokens, roles) in enumerate(samples):
            writer.add(np.array(tokens, dtype=np.int32), np.array(roles, dtype=np.uint8), 2 * row)
        return writer.finalize(
            vocabulary_size=vocabulary_size,
            eos_token_id=9,
            tokenizer_fingerprint="f",
            tokenizer_path="p",
            template=None,
        )


@pytest.fixture
def folder(tmp_path):
    write_store(tmp_path / "data")
    return tmp_path / "data"


def test_round_trip(folder):
    store = SampleStore(folder)
    assert len(store) == 3
    for index, (tokens, roles) in enumerate(SAMPLES):
        np.testing.assert_array_equal(store.tokens(index), np.array(tokens, dtype=np.int32), strict=True)
        np.testing.assert_array_equal(store.roles(index), np.array(roles, dtype=np.uint8), strict=True)
    assert store.tokens(2, 2).tolist() == [2, 3] and store.roles(2, 3).tolist() == [0, 0, 1]
    assert store.tokens(0, 100).tolist() == [5, 6, 7]
    np.testing.assert_array_equal(store.lengths, np.array([3, 1, 4], dtype=np.int32), strict=True)
    np.testing.assert_array_equal(store.offsets, np.array([0, 3, 4, 8], dtype=np.int64), strict=True)
    np.testing.assert_array_equal(store.rows, np.array([0, 2, 4], dtype=np.int64), strict=True)
    # the second sample's only token is its first, which has no loss
    np.testing.assert_array_equal(store.response_counts, np.array([2, 0, 1], dtype=np.int32), strict=True)
    manifest = store.manifest
    assert (manifest.num_samples, manifest.num_tokens, manifest.num_response_tokens) == (3, 8, 3)
    assert (manifest.longest_sample, manifest.template) == (4, "none (plain text)")


def test_arrays_outlive_the_store(folder):
    store = SampleStore(folder)
    lengths, tokens = store.lengths, store.tokens(2)
    del store
    assert lengths.tolist() == [3, 1, 4] and tokens.tolist() == [2, 3, 4, 9]


@pytest.mark.parametrize("index", [-1, 3])
def test_samples_outside(folder, index):
    with pytest.raises(IndexError, match=f"sample {index} of a store of 3"):
        SampleStore(folder).tokens(index)


@pytest.mark.parametrize("roles", [[0, 1, 1], [0, 1, 0]])
def test_fingerprint_sees_tokens_roles_and_borders(tmp_path, roles):
    changed = [
        [([5, 6, 7], roles), *SAMPLES[1:]],
        [([5, 6, 8], [0, 1, 1]), *SAMPLES[1:]],
        [([5, 6], [0, 1]), ([7, 1], [1, 1]), SAMPLES[2]],
    ]
    original = write_store(tmp_path / "original").data_fingerprint
    prints = [write_store(tmp_path / str(n), samples).data_fingerprint for n, samples in enumerate(changed)]
    assert [found == original for found in prints] == [roles == SAMPLES[0][1], False, False]


def test_writer_refuses_impossible_stores(tmp_path):
    with pytest.raises(ValueError, match="has no sample"):
        write_store(tmp_path / "empty", samples=[])
    with pytest.raises(ValueError, match="token 9 is outside the vocabulary of 9"):
        write_store(tmp_path / "vocabulary", vocabulary_size=9)
    for name in ("empty", "vocabulary"):
        with pytest.raises(ValueError, match="is incomplete"):
            SampleStore(tmp_path / name)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist: make it with tools/prepare_data.py"):
        SampleStore(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokens.bin", "roles.bin", "tokens.idx", "roles.idx"])
def test_damaged_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}"):
        SampleStore(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        SampleStore(folder)


@pytest.mark.parametrize("name", ["rows.npy", "response_counts.npy"])
def test_damaged_arrays(folder, name):
    np.save(folder / name, np.zeros(2, dtype=np.int32))
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\) for 3 samples"):
        SampleStore(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        SampleStore(folder)


def test_manifest_of_another_version(folder):
    content = json.loads((folder / "manifest.json").read_text())
    assert StoreManifest.load(folder) == StoreManifest(**content)
    for changed in ({"format_version": 0}, {"format": "other"}, {"unknown": 1}):
        (folder / "manifest.json").write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match="prepare the data again"):
            SampleStore(folder)
    (folder / "manifest.json").write_text(json.dumps(content)[:20])
    with pytest.raises(ValueError, match="is not JSON"):
        SampleStore(folder)
