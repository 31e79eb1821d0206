"""Prepared folders and token columns on disk."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.store import (
    SampleStore,
    StoreManifest,
    StoreWriter,
    TokenColumn,
    TokenColumnWriter,
    describe_mismatch,
)

SAMPLES = [([5, 6, 7], [0, 1, 1]), ([1], [1]), ([2, 3, 4, 9], [0, 0, 1, 0])]
IDENTITY = {"data": "abc", "weights": {"hash": "123", "dtype": "float32"}, "shape": [1, 2]}


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
    with pytest.raises(ValueError, match="absent does not exist; make it with tools/prepare_data.py"):
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


@given(st.integers(0, 40), st.data())
def test_column_resumes_at_the_last_commit(tmp_path_factory, num_values, data):
    """However often the writer stops, with or without a commit, the column is as if written at once."""
    path = tmp_path_factory.mktemp("column")
    expected = np.arange(num_values, dtype=np.float32) / 7
    committed = 0
    for _ in range(data.draw(st.integers(0, 4))):
        stop, commits = data.draw(st.integers(committed, num_values)), data.draw(st.booleans())
        with TokenColumnWriter(path, IDENTITY, num_values) as writer:
            assert writer.num_written == committed
            writer.append(expected[committed:stop])
            if commits:
                writer.commit()
                committed = stop
            assert writer.num_written == committed
        with pytest.raises(ValueError, match="missing or incomplete"):
            TokenColumn(path)
    writer = TokenColumnWriter(path, IDENTITY, num_values)
    writer.append(expected[committed:])
    writer.finish()
    column = TokenColumn(path)
    assert column.manifest == IDENTITY and len(column) == num_values
    np.testing.assert_array_equal(column.values(0, num_values), expected, strict=True)


def write_column(path, values=(1.0, 2.0, 3.0)):
    writer = TokenColumnWriter(path, IDENTITY, len(values))
    writer.append(np.array(values, dtype=np.float32))
    writer.finish()


def test_uncommitted_bytes_on_disk_are_dropped(tmp_path):
    writer = TokenColumnWriter(tmp_path, IDENTITY, 3)
    writer.append(np.array([1], dtype=np.float32))
    writer.commit()
    writer.append(np.array([9, 9], dtype=np.float32))
    writer.close()
    assert (tmp_path / "values.bin").stat().st_size == 12
    writer = TokenColumnWriter(tmp_path, IDENTITY, 3)
    assert writer.num_written == 1 and (tmp_path / "values.bin").stat().st_size == 4
    writer.append(np.array([2, 3], dtype=np.float32))
    writer.finish()
    assert TokenColumn(tmp_path).values(0, 3).tolist() == [1, 2, 3]


def test_column_views(tmp_path):
    write_column(tmp_path)
    column = TokenColumn(tmp_path)
    view = column.values(1, 3)
    assert view.tolist() == [2, 3] and view.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(IndexError, match="of a column of 3"):
            column.values(start, stop)


def test_finished_column_can_be_opened_for_writing_again(tmp_path):
    write_column(tmp_path)
    writer = TokenColumnWriter(tmp_path, IDENTITY, 3)
    assert writer.num_written == 3
    writer.finish()
    assert TokenColumn(tmp_path).values(0, 3).tolist() == [1, 2, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "values.bin"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_column_in_the_way(tmp_path, finished):
    writer = TokenColumnWriter(tmp_path, IDENTITY, 1)
    writer.append(np.array([1], dtype=np.float32))
    writer.finish() if finished else writer.commit()
    writer.close()
    other = IDENTITY | {"weights": {"hash": "456", "dtype": "float32"}}
    difference = "weights.hash: expected '456', found '123'; move it"
    with pytest.raises(ValueError, match=difference):
        TokenColumnWriter(tmp_path, other, 1)
    with pytest.raises(ValueError, match="num_values: expected 2, found 1; move it"):
        TokenColumnWriter(tmp_path, IDENTITY, 2)
    if finished:
        TokenColumn(tmp_path).require(IDENTITY)
        with pytest.raises(ValueError, match=difference):
            TokenColumn(tmp_path).require(other)


def test_too_many_and_too_few_values(tmp_path):
    writer = TokenColumnWriter(tmp_path, IDENTITY, 2)
    with pytest.raises(ValueError, match="takes 2 values, 0 are there and 3 more are given"):
        writer.append(np.zeros(3, dtype=np.float32))
    writer.append(np.zeros(1, dtype=np.float32))
    with pytest.raises(ValueError, match="has 1 of 2 values"):
        writer.finish()
    writer.close()


def test_damaged_columns(tmp_path):
    write_column(tmp_path / "whole")
    for damage in ("cut", "gone"):
        path = shutil.copytree(tmp_path / "whole", tmp_path / damage)
        if damage == "cut":
            (path / "values.bin").write_bytes(b"\0" * 11)
        else:
            (path / "values.bin").unlink()
        with pytest.raises(ValueError, match=r"values.bin (has 11 bytes|is missing)"):
            TokenColumn(path)
        with pytest.raises(ValueError, match="where 12 were committed"):
            TokenColumnWriter(path, IDENTITY, 3)
    content = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps(content | {"format_version": 0}))
    with pytest.raises(ValueError, match="version 0, this version reads"):
        TokenColumn(tmp_path / "whole")


def test_describe_mismatch():
    assert describe_mismatch({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}) is None
    found = describe_mismatch({"a": 1, "b": {"c": 2}, "d": None}, {"a": 2, "b": {"c": 3, "e": 4}})
    assert found == (
        "a: expected 1, found 2; b.c: expected 2, found 3; b.e: expected nothing, found 4; "
        "d: expected None, found nothing"
    )
