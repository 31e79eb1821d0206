"""Scores, masks and weights of tokens from Parquet files, in token columns."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sstoken.data import external
from megatron_sstoken.data.batches import SampleFilter
from megatron_sstoken.data.column import TokenColumn
from megatron_sstoken.data.external import DATA_KEY, fill_values, open_external
from megatron_sstoken.data.response_chunks import response_chunks
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.whole_column import write_column
from tests.helpers.workbench import make_samples, make_store

SAMPLES = make_samples(9, seed=4, longest=20)
ROWS = [0, 3, 4, 5, 5, 6, 8, 11, 12]  # some rows of the input were skipped, one is there twice


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    samples = [*SAMPLES[:4], SAMPLES[3], *SAMPLES[5:]]
    return SampleStore(make_store(tmp_path_factory.mktemp("external") / "data", samples, ROWS))


def all_rows(store, seed=0):
    """A row for every token of the data, each input row once, in random order, with random values."""
    generator = np.random.default_rng(seed)
    first = [n for n in range(len(store)) if n == 0 or store.rows[n] != store.rows[n - 1]]
    columns = {
        "sample": np.concatenate([np.full(store.lengths[n], store.rows[n]) for n in first]),
        "position": np.concatenate([np.arange(store.lengths[n]) for n in first]).astype(np.int32),
        "token": np.concatenate([store.tokens(n) for n in first]),
        "role": np.concatenate([store.roles(n) for n in first]).astype(np.int8),
    }
    order = generator.permutation(len(columns["sample"]))
    columns = {name: values[order] for name, values in columns.items()}
    number = len(order)
    columns["score"] = generator.normal(size=number)
    columns["selected"] = generator.random(number) < 0.5
    columns["weight"] = generator.random(number).astype(np.float32)
    return columns


def write(path, columns, row_group=50, metadata=None):
    """As token records hold them, with texts, which nobody reads here."""
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    table = table.append_column("text", pa.array(["\\xe2"] * len(table)).dictionary_encode())
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group)
    return str(path)


def fill(store, name, value):
    column = np.full(store.manifest.num_tokens, np.nan, dtype=np.float32)
    told = fill_values(open_external(name, store.manifest.data_fingerprint), value, store, column, lambda number: None)
    return column, told


def is_scored(store):
    """bool [num_tokens]: response tokens with a loss."""
    position = np.concatenate([np.arange(length) for length in store.lengths])
    return (store.role_stream == 1) & (position > 0)


@pytest.mark.parametrize("value", ["score", "selected", "weight"])
@pytest.mark.parametrize("batch_rows", [7, 1 << 18])
def test_every_value_comes_to_its_token(store, tmp_path, value, batch_rows, monkeypatch):
    monkeypatch.setattr(external, "BATCH_ROWS", batch_rows)
    columns = all_rows(store)
    column, (filled, ignored) = fill(store, write(tmp_path / "a.parquet", columns), value)
    table = {
        key: v
        for *key, v in zip(columns["sample"], columns["position"], columns[value], strict=True)
        for key in [tuple(key)]
    }
    wanted = np.array(
        [table[row, p] for row, length in zip(store.rows, store.lengths, strict=True) for p in range(length)],
        np.float32,
    )
    scored = is_scored(store)
    np.testing.assert_array_equal(column, np.where(scored, wanted, np.nan))
    assert filled == scored.sum() == store.manifest.num_response_tokens
    others = ~scored & (wanted == 1 if value == "selected" else True)
    assert ignored == others.sum()


def test_several_files_and_their_names(store, tmp_path):
    columns = all_rows(store)
    whole, _ = fill(store, write(tmp_path / "whole.parquet", columns), "score")
    (tmp_path / "parts").mkdir()
    for number in range(3):
        part = {name: values[number::3] for name, values in columns.items()}
        write(tmp_path / "parts" / f"{number}.parquet", part)
    for name in (tmp_path / "parts", tmp_path / "parts" / "*.parquet"):
        np.testing.assert_array_equal(fill(store, str(name), "score")[0], whole)
    assert len(open_external(str(tmp_path / "parts"), "").checksums()) == 3


def test_null_says_nothing(store, tmp_path):
    columns = all_rows(store)
    known = np.arange(len(columns["sample"])) % 2 == 0
    columns["score"] = pa.array(columns["score"], mask=~known)
    columns["selected"] = pa.array(columns["selected"], mask=~known)
    name = write(tmp_path / "a.parquet", columns)
    for value in ("score", "selected"):
        column, (filled, _) = fill(store, name, value)
        assert 0 < filled == np.isfinite(column).sum() < store.manifest.num_response_tokens


def at(columns, store):
    """Number of a row of a response token with a loss, of a sample that is there once."""
    good = (columns["role"] == 1) & (columns["position"] > 0) & (columns["sample"] != 5)
    return int(good.argmax())


def changed(columns, number, **values):
    found = {name: column.copy() for name, column in columns.items()}
    for name, value in values.items():
        found[name][number] = value
    return found


BROKEN = {
    "sample": (
        {"sample": 2},
        "1 rows name a sample that data.train does not hold (first: sample 2, position {position})",
    ),
    "beyond": ({"sample": 10**9}, "1 rows name a sample that data.train does not hold"),
    "position": (
        {"position": 500},
        "1 rows name a position outside their sample (first: sample {sample}, position 500)",
    ),
    "before": ({"position": -1}, "1 rows name a position outside their sample"),
    "token": (
        {"token": 98765},
        "1 rows hold another token than data.train (first: sample {sample}, position {position})",
    ),
    "score": ({"score": np.nan}, "1 scores are NaN (first: sample {sample}, position {position})"),
    "weight": ({"weight": -1.0}, "1 weights are negative or not finite (first: sample {sample}, position {position})"),
    "infinite": ({"weight": np.inf}, "1 weights are negative or not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_cannot_be_right(store, tmp_path, name):
    changes, message = BROKEN[name]
    columns = all_rows(store)
    number = at(columns, store)
    place = {"sample": columns["sample"][number], "position": columns["position"][number]}
    path = write(tmp_path / "a.parquet", changed(columns, number, **changes))
    with pytest.raises(ValueError) as error:
        fill(store, path, "weight" if "weight" in changes else "score")
    assert message.format(**place) in str(error.value) and str(error.value).startswith(f"selection.external: {path}: ")
    assert "mend the file, or name the one of this data" in str(error.value)


@pytest.mark.parametrize("batch_rows", [3, 1 << 18])
def test_all_faults_are_counted(store, tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(external, "BATCH_ROWS", batch_rows)
    columns = all_rows(store)
    columns["token"] = columns["token"] + (columns["sample"] == 3)
    wrong = int((columns["sample"] == 3).sum())
    number = at(columns, store)
    columns = {name: np.append(values, values[number]) for name, values in columns.items()}
    columns["sample"][columns["sample"] == 12] = 13
    with pytest.raises(ValueError) as error:
        fill(store, write(tmp_path / "a.parquet", columns), "selected")
    assert f"{wrong:,} rows hold another token than data.train" in str(error.value)
    assert f"{(columns['sample'] == 13).sum():,} rows name a sample" in str(error.value)
    if columns["sample"][number] not in (3, 13):
        assert "1 rows name a token that another row names" in str(error.value)


def test_records_of_a_repeated_row_may_repeat_it(store, tmp_path):
    columns = all_rows(store)
    twice = columns["sample"] == 5
    double = {name: np.concatenate([values, values[twice]]) for name, values in columns.items()}
    plain, (filled, _) = fill(store, write(tmp_path / "a.parquet", columns), "score")
    found, (again, _) = fill(store, write(tmp_path / "b.parquet", double), "score")
    np.testing.assert_array_equal(found, plain)
    assert filled == again


def test_files_that_cannot_be_read(store, tmp_path):
    columns, fingerprint = all_rows(store), store.manifest.data_fingerprint
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no Parquet")
    path = tmp_path / "a.parquet"
    cases = {
        str(tmp_path / "absent.parquet"): "does not exist: name a Parquet file, a folder of them, or a pattern",
        str(tmp_path / "empty"): "holds no \\*.parquet file: name",
        str(tmp_path / "text.parquet"): "cannot be read as Parquet",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_external(name, fingerprint)
    for change, message in (
        ({"sample": None}, "has no column sample: it needs sample and position"),
        ({"position": columns["position"].astype(float)}, "column position is double: make it whole numbers"),
        ({"selected": columns["selected"].astype(int)}, "column selected is int64: make it true or false"),
        ({"score": columns["score"].astype(str)}, "column score is string: make it numbers"),
        ({"score": None, "selected": None, "weight": None}, "has neither score nor selected nor weight"),
    ):
        with pytest.raises(ValueError, match=message):
            open_external(write(path, columns | change), fingerprint)
    other = {DATA_KEY: "f" * 64}
    with pytest.raises(ValueError, match=r"a.parquet is of other data than data.train \(by its fingerprint\): score"):
        open_external(write(path, columns, metadata=other), fingerprint)
    open_external(write(path, columns, metadata={DATA_KEY: fingerprint}), fingerprint)


def test_nothing_but_null(store, tmp_path):
    columns = all_rows(store)
    columns["score"] = pa.nulls(len(columns["sample"]), pa.float32())
    with pytest.raises(ValueError, match="no response token of the data has a score: name a file that tells it"):
        fill(store, write(tmp_path / "a.parquet", columns), "score")
    none = {name: values[:0] for name, values in all_rows(store).items()}
    with pytest.raises(ValueError, match="no response token of the data has a selected"):
        fill(store, write(tmp_path / "b.parquet", none), "selected")


def test_a_null_position_is_no_position(store, tmp_path):
    columns = all_rows(store)
    mask = np.zeros(len(columns["sample"]), dtype=bool)
    mask[at(columns, store)] = True
    columns["position"] = pa.array(columns["position"], mask=mask)
    with pytest.raises(ValueError, match="1 rows name a position outside their sample"):
        fill(store, write(tmp_path / "a.parquet", columns), "score")


@pytest.mark.parametrize("size", [1, 17, 1 << 20])
def test_response_chunks_are_all_response_tokens(store, size):
    used = np.array([0, 2, 3, 7, 8])
    samples = SampleFilter(used, np.minimum(store.lengths, 12).astype(np.int32), 0, 0, 0)
    chunks = list(response_chunks(store, samples, size))
    wanted = [
        (index, position, int(store.offsets[index]) + position)
        for index in used
        for position, role in enumerate(store.roles(index, 12))
        if role == 1 and position > 0
    ]
    found = [one for c in chunks for one in zip(c.index, c.position, c.place, strict=True)]
    assert found == wanted and (size > 1 or len(chunks) == len(used))


def test_a_column_appears_whole_or_not_at_all(store, tmp_path):
    def half(values):
        values[: len(values) // 2] = 2.5

    write_column(tmp_path / "column", {"kind": "half"}, 11, half)
    column = TokenColumn(tmp_path / "column")
    column.require({"kind": "half"})
    np.testing.assert_array_equal(column.values(0, 11), [2.5] * 5 + [np.nan] * 6)

    def fails(values):
        values[0] = 1
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_column(tmp_path / "other", {}, 11, fails)
    assert [entry.name for entry in tmp_path.iterdir()] == ["column"]

    class Column:
        values = staticmethod(column.values)

    samples = SampleFilter(np.array([0]), store.lengths[:1].clip(max=11), 0, 0, 0)
    (chunk,) = response_chunks(store, samples)
    np.testing.assert_array_equal(chunk.read(Column()), column.values(0, 11)[chunk.place])
