"""Token records: their schema, what is null, and files that are whole or absent."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sstoken.data.external import DATA_KEY
from megatron_sstoken.data.token_text import TokenTexts
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.passes.columns import columns_of
from megatron_sstoken.training.records import SCHEMA, RecordWriter, read_records
from tests.helpers.token_batches import TURNS, make_batch, make_report
from tests.helpers.toy import make_tokenizer


def test_schema():
    """Names, types and which may be null are fixed: other tools read these files."""
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
        "weight": ("float", True),
        "entropy": ("float", True),
        "top1": ("float", True),
        "text": ("dictionary<values=string, indices=int32, ordered=0>", True),
    }
    assert {field.name: (str(field.type), field.nullable) for field in SCHEMA} == wanted
    assert SCHEMA.names == list(wanted)


def columns_with(**changes) -> dict[str, np.ndarray]:
    columns = {
        "sample": np.array([2**40, 7]),
        "position": np.array([0, 1], dtype=np.int32),
        "token": np.array([5, 151935], dtype=np.int32),
        "role": np.array([0, 1], dtype=np.int8),
        "selected": np.array([False, True]),
    }
    columns |= {
        name: np.array([np.nan, 0.25], dtype=np.float32) for name in SCHEMA.names if name not in [*columns, "text"]
    }
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


def test_a_file_says_of_which_data_it_is(tmp_path):
    for fingerprint, wanted in (("a" * 64, {DATA_KEY: b"a" * 64}), (None, {})):
        with RecordWriter(tmp_path / "records.parquet", fingerprint) as writer:
            writer.write(columns_with())
        assert (pq.read_schema(tmp_path / "records.parquet").metadata or {}) == wanted


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
    assert set(found.pop("text")) == {None}
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


def test_texts_of_tokens(tmp_path):
    """Each is stored once, whatever the file holds; a file that others made without the column is read as before."""
    make_tokenizer(tmp_path / "tokenizer")
    texts = TokenTexts(load_tokenizer(tmp_path / "tokenizer"))
    tokens = np.array([5, 260], dtype=np.int32)
    with RecordWriter(tmp_path / "records.parquet", texts=texts) as writer:
        writer.write(columns_with(token=tokens))
        writer.write(columns_with(token=tokens[::-1]))
    table = pq.read_table(tmp_path / "records.parquet")
    assert table.schema.equals(SCHEMA)
    wanted = [texts.one(5), texts.one(260), texts.one(260), texts.one(5)]
    assert table["text"].to_pylist() == wanted == read_records(tmp_path / "records.parquet")["text"].tolist()
    with RecordWriter(tmp_path / "without.parquet") as writer:
        writer.write(columns_with())
    assert read_records(tmp_path / "without.parquet")["text"].tolist() == [None, None]
