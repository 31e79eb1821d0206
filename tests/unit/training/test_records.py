"""Token records: their schema, what is null, their order, and files that are whole or absent."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.passes.columns import columns_of, gather_columns
from megatron_sstoken.training.records import SCHEMA, RecordWriter, read_records
from tests.unit.training import make_batch, make_report

TURNS = [[0, 0, 1, 1, 0, 1], [1, 0, 1, 1], [0, 1]]


@pytest.fixture(scope="module")
def layout():
    """A layout of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(is_replica_leader=True, is_writer=True, data=dist.group.WORLD, data_size=1)
    dist.destroy_process_group()


def test_schema():
    """Names, types and which may be null are fixed: other tools read these files (issue 2)."""
    wanted = {
        "sample": ("int64", False),
        "position": ("int32", False),
        "token": ("int32", False),
        "role": ("int8", False),
        "loss": ("float", True),
        "history_loss": ("float", True),
        "rel_norm": ("float", True),
        "attention": ("float", True),
        "score": ("float", True),
        "selected": ("bool", False),
        "entropy": ("float", True),
        "top1": ("float", True),
    }
    assert {field.name: (str(field.type), field.nullable) for field in SCHEMA} == wanted
    assert SCHEMA.names == list(wanted)


def test_columns_token_by_token():
    batch = make_batch(TURNS, 7, first_sample=5)
    report = make_report(batch)
    entropy, top1 = torch.rand(2, len(report.loss)).unbind()
    report = replace(report, values={**report.values, "entropy": entropy, "top1": top1})
    columns = columns_of(report)
    row = 0
    for number, roles in enumerate(TURNS):
        for i, role in enumerate(roles):
            t = 7 * number + i
            in_response = role == 1 and i > 0
            found = {name: values[row].item() for name, values in columns.items()}
            assert (found["sample"], found["position"], found["role"]) == (5 + 2 * number, i, role)
            assert found["token"] == int(batch.tokens[0, t])
            assert found["selected"] == bool(report.selection.mask[t])
            for name, values, defined in (
                ("loss", report.loss, i > 0),
                ("history_loss", batch.history_loss, i > 0),
                ("rel_norm", report.selection.rel_norm, in_response),
                ("attention", report.values["attention"], in_response),
                ("score", report.selection.score, in_response),
                ("entropy", entropy, True),  # as the report has it: NaN where nothing was predicted
                ("top1", top1, True),
            ):
                np.testing.assert_equal(found[name], float(values[t]) if defined else np.nan, err_msg=f"{name} {row}")
            row += 1
    assert {len(values) for values in columns.values()} == {row}
    assert columns.keys() == set(SCHEMA.names) and columns["selected"].any()


def test_columns_without_selection_history_and_attention():
    report = make_report(make_batch(TURNS, 7, history=False), selected=False, attention=False)
    columns = columns_of(report)
    for name in ("history_loss", "rel_norm", "attention", "score", "entropy", "top1"):
        assert np.isnan(columns[name]).all()
    assert not columns["selected"].any() and columns["selected"].dtype == bool
    assert (~np.isnan(columns["loss"])).sum() == 5 + 3 + 1


def test_gathered_columns_are_sorted(layout):
    """Samples 8 and 10, then 2, 4 and 6, then a micro-batch of padding."""
    batches = [
        make_batch(TURNS[:2], 7, first_sample=8),
        make_batch(TURNS, 7, first_sample=2, seed=1),
        make_batch([], 7, num_rows=1),
    ]
    reports = [make_report(batch, seed=number) for number, batch in enumerate(batches)]
    columns = gather_columns(reports, layout)
    roles = {2: TURNS[0], 4: TURNS[1], 6: TURNS[2], 8: TURNS[0], 10: TURNS[1]}
    keys = [(sample, i) for sample, row in roles.items() for i in range(len(row))]
    assert list(zip(columns["sample"].tolist(), columns["position"].tolist(), strict=True)) == keys
    assert columns["role"].tolist() == [role for row in roles.values() for role in row]
    # what belongs to a token moved along with it
    parts = [columns_of(report) for report in reports]
    for name in ("token", "loss", "score", "selected"):
        wanted = {
            key: value
            for part in parts
            for *key, value in zip(part["sample"], part["position"], part[name], strict=True)
            for key in [tuple(key)]
        }
        np.testing.assert_array_equal(columns[name], [wanted[key] for key in keys], err_msg=name)


def test_others_do_not_gather():
    assert gather_columns([], SimpleNamespace(is_replica_leader=False)) is None


def columns_with(**changes) -> dict[str, np.ndarray]:
    columns = {
        "sample": np.array([2**40, 7]),
        "position": np.array([0, 1], dtype=np.int32),
        "token": np.array([5, 151935], dtype=np.int32),
        "role": np.array([0, 1], dtype=np.int8),
        "selected": np.array([False, True]),
    }
    columns |= {name: np.array([np.nan, 0.25], dtype=np.float32) for name in SCHEMA.names if name not in columns}
    return columns | changes


def test_undefined_is_null_and_nothing_is_nan(tmp_path):
    path = tmp_path / "records.parquet"
    with RecordWriter(path) as writer:
        writer.write(columns_with())
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    for name in ("loss", "history_loss", "rel_norm", "attention", "score"):
        assert table[name].to_pylist() == [None, 0.25]
    assert table["sample"].to_pylist() == [2**40, 7] and table["token"].to_pylist() == [5, 151935]
    assert table["selected"].to_pylist() == [False, True] and table["role"].to_pylist() == [0, 1]


def test_round_trip_of_several_parts(tmp_path):
    path = tmp_path / "a" / "new" / "folder" / "records.parquet"
    reports = [make_report(make_batch(TURNS, 7, first_sample=first, seed=first), seed=first) for first in (0, 10)]
    parts = [columns_of(report) for report in reports]
    with RecordWriter(path) as writer:
        for part in parts:
            writer.write(part)
    assert pq.ParquetFile(path).num_row_groups == 2
    found = read_records(path)
    assert list(found) == SCHEMA.names
    for name, values in found.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]), err_msg=name)


def test_a_file_without_a_token(tmp_path):
    with RecordWriter(tmp_path / "records.parquet"):
        pass
    table = pq.read_table(tmp_path / "records.parquet")
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "records.parquet"
    with RecordWriter(path) as writer:
        writer.write(columns_with())
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.parquet"]


def test_an_error_leaves_no_file(tmp_path):
    path = tmp_path / "records.parquet"
    with pytest.raises(RuntimeError, match="in between"), RecordWriter(path) as writer:
        writer.write(columns_with())
        raise RuntimeError("in between")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_an_earlier_file_alone(tmp_path):
    path = tmp_path / "records.parquet"
    with RecordWriter(path) as writer:
        writer.write(columns_with())
    before = path.read_bytes()
    with pytest.raises(RuntimeError), RecordWriter(path):
        raise RuntimeError
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["records.parquet"]
    with RecordWriter(path) as writer:
        writer.write(columns_with(token=np.array([1, 2], dtype=np.int32)))
    assert read_records(path)["token"].tolist() == [1, 2]


def test_values_that_do_not_fit_are_refused(tmp_path):
    """A token id beyond int32 must not wrap around."""
    with pytest.raises(pa.ArrowInvalid), RecordWriter(tmp_path / "records.parquet") as writer:
        writer.write(columns_with(token=np.array([1, 2**31])))
    assert list(tmp_path.iterdir()) == []


def test_columns_do_not_share_memory_with_later_steps():
    """Reports are gathered after the step: what they hold must not change with the next batch's tensors."""
    report = make_report(make_batch(TURNS, 7))
    columns = columns_of(report)
    before = columns["loss"].copy()
    report.loss.add_(1.0)
    np.testing.assert_array_equal(columns["loss"], before)
    assert isinstance(report.loss, torch.Tensor)
