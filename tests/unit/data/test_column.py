"""Token columns on disk."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.column import TokenColumn, TokenColumnWriter, describe_mismatch

IDENTITY = {"data": "abc", "weights": {"hash": "123", "dtype": "float32"}, "shape": [1, 2]}


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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checksums.json", "manifest.json", "values.bin"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_column_in_the_way(tmp_path, finished):
    writer = TokenColumnWriter(tmp_path, IDENTITY, 1)
    writer.append(np.array([1], dtype=np.float32))
    writer.finish() if finished else writer.commit()
    writer.close()
    other = IDENTITY | {"weights": {"hash": "456", "dtype": "float32"}}
    difference = "weights.hash is '123', must be '456': move it"
    with pytest.raises(ValueError, match=difference):
        TokenColumnWriter(tmp_path, other, 1)
    with pytest.raises(ValueError, match="num_values is 1, must be 2: move it"):
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
    assert found == ("a is 2, must be 1; b.c is 3, must be 2; b.e is 4, must be absent; d is absent, must be None")
