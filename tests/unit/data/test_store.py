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
        return finalize(writer, vocabulary_size)


def finalize(writer, vocabulary_size=10):
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


def test_weights_of_samples_begun_without(tmp_path):
    """Weights differ from the roles only from the second sample on; labels are counted; a copy of version 1 reads on."""
    tokens, roles = np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 0], dtype=np.uint8)
    weights = np.array([0, 0, 0.5, 1.75, 0], dtype=np.float32)
    with StoreWriter(tmp_path / "out") as writer:
        writer.add(tokens, roles, 0, label="math")
        writer.add(tokens, roles, 1, weights=weights, label="chat")
        writer.add(tokens, roles, 2, label="math")
        manifest = finalize(writer)
    store = SampleStore(tmp_path / "out")
    assert manifest.weighted and [store.weights(index).tolist() for index in range(3)] == [
        roles.tolist(), weights.tolist(), roles.tolist(),
    ]  # fmt: skip
    assert store.weights(1, 3).tolist() == [0, 0, 0.5]
    assert manifest.labels == ["math", "chat"] and store.labels.tolist() == [0, 1, 0]
    with pytest.raises(IndexError):
        store.weights(3)


def test_weights_equal_to_the_roles_are_not_stored(tmp_path):
    tokens, roles = np.arange(3, dtype=np.int32), np.array([0, 1, 1], dtype=np.uint8)
    for name, weights in (("with", roles.astype(np.float32)), ("without", None)):
        with StoreWriter(tmp_path / name) as writer:
            writer.add(tokens, roles, 0, weights=weights)
            assert not finalize(writer).weighted
    fingerprints = {SampleStore(tmp_path / name).manifest.data_fingerprint for name in ("with", "without")}
    assert len(fingerprints) == 1 and not (tmp_path / "with" / "weights.bin").exists()


def test_other_weights_are_other_data(tmp_path):
    tokens, roles = np.arange(3, dtype=np.int32), np.array([0, 1, 1], dtype=np.uint8)
    fingerprints = set()
    for value in (0.5, 0.25):
        with StoreWriter(tmp_path / str(value)) as writer:
            writer.add(tokens, roles, 0, weights=np.array([0, 1, value], dtype=np.float32))
            fingerprints.add(finalize(writer).data_fingerprint)
    assert len(fingerprints) == 2


def test_a_folder_of_the_first_version_is_read(tmp_path):
    """It has neither labels nor weights nor notes."""
    with StoreWriter(tmp_path / "out") as writer:
        writer.add(np.arange(3, dtype=np.int32), np.array([0, 1, 1], dtype=np.uint8), 0)
        finalize(writer)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    old = {key: value for key, value in content.items() if key not in ("weighted", "labels", "notes")}
    path.write_text(json.dumps(old | {"format_version": 1}))
    (tmp_path / "out" / "labels.npy").unlink()
    store = SampleStore(tmp_path / "out")
    assert store.labels.tolist() == [0] and store.weights(0).tolist() == [0, 1, 1]
