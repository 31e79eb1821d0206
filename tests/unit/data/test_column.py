"""Token columns on disk: what was written is there, what was not is NaN, and nothing counts before it is on disk."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.data.column import TokenColumn, TokenColumnWriter, describe_mismatch
from megatron_sstoken.integrity import damage

IDENTITY = {"data": "abc", "weights": {"hash": "123", "dtype": "float32"}, "shape": [1, 2]}


@given(st.integers(0, 40), st.data())
@settings(deadline=None)
def test_a_column_grows_by_what_is_committed(tmp_path_factory, num_values, data):
    """Stretches in any order, from writers that stop with or without a commit: those committed are there, others NaN."""
    path = tmp_path_factory.mktemp("column")
    all_values = np.arange(num_values, dtype=np.float32) / 7
    expected = np.full(num_values, np.nan, dtype=np.float32)
    borders = sorted(data.draw(st.sets(st.integers(0, num_values), max_size=6)))
    stretches = data.draw(st.permutations(list(zip(borders, borders[1:], strict=False))))
    seen = []
    for start, stop in stretches:
        with TokenColumnWriter(path, IDENTITY, num_values) as writer:
            writer.write(start, all_values[start:stop])
            if data.draw(st.booleans()):
                writer.commit()
                expected[start:stop] = all_values[start:stop]
        seen.append((TokenColumn(path), expected.copy()))
    for column, values in seen:  # a reader sees what there was when it opened the column
        assert column.manifest == IDENTITY and len(column) == num_values
        np.testing.assert_array_equal(column.values(0, num_values), values, strict=True)
        starts = np.array([start for start, _ in stretches], dtype=np.int64)
        stops = np.array([stop for _, stop in stretches], dtype=np.int64)
        held = [not np.isnan(values[start:stop]).any() for start, stop in stretches]
        assert column.holds(starts, stops).tolist() == held
    if stretches:
        assert damage(path) == []


def write_column(path, values=(1.0, 2.0, 3.0)):
    with TokenColumnWriter(path, IDENTITY, len(values)) as writer:
        writer.write(0, np.array(values, dtype=np.float32))
        writer.commit()


def test_an_entry_that_a_kill_has_cut_does_not_count(tmp_path):
    write_column(tmp_path)
    with open(tmp_path / "written.bin", "ab") as file:
        file.write(b"12345")
    assert TokenColumn(tmp_path).values(0, 3).tolist() == [1, 2, 3]
    TokenColumnWriter(tmp_path, IDENTITY, 3).close()
    assert (tmp_path / "written.bin").stat().st_size == 24


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


def test_files_of_a_column(tmp_path):
    write_column(tmp_path)
    names = ["checksums.json", "manifest.json", "values.bin", "written.bin"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_column_of_version_1_is_whole(tmp_path):
    (tmp_path / "values.bin").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    header = {"format": "megatron_sstoken.token_column", "format_version": 1, "num_values": 3, "identity": IDENTITY}
    (tmp_path / "manifest.json").write_text(json.dumps(header))
    column = TokenColumn(tmp_path)
    assert column.version == 1 and column.values(0, 3).tolist() == [0, 1, 2]
    assert column.holds(np.array([0, 1]), np.array([1, 3])).all()
    with pytest.raises(ValueError, match="format_version is 1, must be 2: move it"):
        TokenColumnWriter(tmp_path, IDENTITY, 3)
    (tmp_path / "manifest.json").rename(tmp_path / "progress.json")
    with pytest.raises(ValueError, match="left unfinished by an earlier version"):
        TokenColumnWriter(tmp_path, IDENTITY, 3)


def test_another_column_in_the_way(tmp_path):
    write_column(tmp_path, [1.0])
    other = IDENTITY | {"weights": {"hash": "456", "dtype": "float32"}}
    difference = "weights.hash is '123', must be '456': move it"
    with pytest.raises(ValueError, match=difference):
        TokenColumnWriter(tmp_path, other, 1)
    with pytest.raises(ValueError, match="num_values is 1, must be 2: move it"):
        TokenColumnWriter(tmp_path, IDENTITY, 2)
    TokenColumn(tmp_path).require(IDENTITY)
    with pytest.raises(ValueError, match=difference):
        TokenColumn(tmp_path).require(other)


def test_values_beyond_the_column(tmp_path):
    with TokenColumnWriter(tmp_path, IDENTITY, 2) as writer:
        for start, size in ((0, 3), (2, 1), (-1, 1)):
            with pytest.raises(ValueError, match=f"takes 2 values, and {size} are given from {start} on"):
                writer.write(start, np.zeros(size, dtype=np.float32))


def test_damaged_columns(tmp_path):
    with pytest.raises(ValueError, match="missing or incomplete"):
        TokenColumn(tmp_path / "nowhere")
    write_column(tmp_path / "whole")
    for kind, told in (
        ("cut", "values.bin has 11 bytes"),
        ("gone", "values.bin is missing"),
        ("list", "written.bin is missing"),
    ):
        path = shutil.copytree(tmp_path / "whole", tmp_path / kind)
        if kind == "cut":
            (path / "values.bin").write_bytes(b"\0" * 11)
        else:
            (path / ("values.bin" if kind == "gone" else "written.bin")).unlink()
        with pytest.raises(ValueError, match=told):
            TokenColumn(path)
        with pytest.raises(ValueError, match=told):
            TokenColumnWriter(path, IDENTITY, 3)
    content = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps(content | {"format_version": 0}))
    with pytest.raises(ValueError, match="version 0, this version reads"):
        TokenColumn(tmp_path / "whole")


def test_describe_mismatch():
    assert describe_mismatch({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}) is None
    found = describe_mismatch({"a": 1, "b": {"c": 2}, "d": None}, {"a": 2, "b": {"c": 3, "e": 4}})
    assert found == ("a is 2, must be 1; b.c is 3, must be 2; b.e is 4, must be absent; d is absent, must be None")
