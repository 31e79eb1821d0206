"""Ranked samples: their figures, their text, and the row of the input that each was made of."""

import json
import os

import numpy as np
import pytest

from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.token_text import TokenTexts
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.report import record_files
from megatron_sstoken.report.export import NO_DATA, export
from megatron_sstoken.report.prepared import PreparedData
from megatron_sstoken.report.record_files import find_records
from megatron_sstoken.report.texts import Texts, joined, texts_in_records
from tests.helpers.preparation import run
from tests.helpers.token_records import Token, write_file, write_rows
from tests.helpers.toy import make_tokenizer

HOSTILE = "</script><img src=x onerror=alert(1)> \u202eabc\u2066 {{7*7}} \\xe2\\x80 \x00 ∑é🎉"


def rows_of(number):
    def message(role, content):
        return {"role": role, "content": f"{HOSTILE} {content}"}

    return [{"messages": [message("user", one), message("assistant", one * one)], "id": one} for one in range(number)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder with files of rows (with blank lines, an array, Parquet), the tokenizer, and what was prepared of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("export")
    make_tokenizer(folder / "tokenizer")
    rows = rows_of(9)
    lines = [json.dumps(one) for one in rows[:4]]
    (folder / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (folder / "b.json").write_text(json.dumps(rows[4:6]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows[6:]), folder / "c.parquet")
    files = [folder / name for name in ("a.jsonl", "b.json", "c.parquet")]
    run(files, folder / "tokenizer", folder / "data")
    return folder, rows


def records_of(folder, path, samples):
    """Records of samples of the store, with texts; of a sample i the last i tokens are dropped."""
    store = SampleStore(folder / "data")
    texts = TokenTexts(load_tokenizer(folder / "tokenizer"))
    made = []
    for sample in samples:
        ids, roles = store.tokens(sample).tolist(), store.roles(sample).tolist()
        last = len(ids) - sample - 1
        tokens = [
            Token(token, role, loss=sample, history_loss=1.0, selected=place < last, text=texts.one(token))
            for place, (token, role) in enumerate(zip(ids, roles, strict=True))
        ]
        made.append((int(store.rows[sample]), tokens))
    return write_file(path, made, fingerprint=store.manifest.data_fingerprint)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_those_of_the_input_and_texts_those_of_the_samples(prepared, tmp_path, monkeypatch):
    folder, rows = prepared
    monkeypatch.setattr(record_files, "BATCH_ROWS", 17)
    samples = [8, 0, 3, 5, 6]
    files = find_records(records_of(folder, tmp_path / "r.parquet", samples))
    target = tmp_path / "out" / "dropped.jsonl"
    counts = export(files, texts_in_records(files), PreparedData.open(folder / "data"), target)
    found = read(target)
    assert counts == (5, 5)
    assert [one["sample"] for one in found] == sorted(samples, reverse=True)  # the more dropped, the higher the number
    store, tokenizer = SampleStore(folder / "data"), load_tokenizer(folder / "tokenizer")
    for one in found:
        assert one["row"] == rows[one["sample"]] and "note" not in one
        assert one["text"] == tokenizer.decode(store.tokens(one["sample"]).tolist())
        assert HOSTILE in one["text"]
        assert one["num_response"] == store.response_counts[one["sample"]] and one["mean_loss"] == one["sample"]
        assert one["source"] == {0: "a", 3: "a", 5: "b", 6: "c", 8: "c"}[one["sample"]]
    assert sorted(os.listdir(target.parent)) == [target.name]


def test_files_that_have_changed_or_are_gone_give_no_rows(prepared, tmp_path):
    folder, rows = prepared
    files = find_records(records_of(folder, tmp_path / "r.parquet", [0, 4, 6]))
    data = PreparedData.open(folder / "data")
    text = (folder / "b.json").read_text(encoding="utf-8")
    try:
        (folder / "b.json").write_text(text.replace('"id": 4', '"id": 7'), encoding="utf-8")
        assert export(files, texts_in_records(files), data, tmp_path / "a.jsonl") == (3, 1)
        (folder / "b.json").unlink()
        assert export(files, texts_in_records(files), data, tmp_path / "b.jsonl") == (3, 1)
    finally:
        (folder / "b.json").write_text(text, encoding="utf-8")
    for name, reason in (("a", "has changed since the data was prepared"), ("b", "is not there any more")):
        by_sample = {one["sample"]: one for one in read(tmp_path / f"{name}.jsonl")}
        assert by_sample[0]["row"] == rows[0]
        for sample in (4, 6):  # the rows of later files are counted from those of this one
            assert by_sample[sample]["row"] is None and reason in by_sample[sample]["note"]
            assert by_sample[sample]["text"]


def test_the_last_step_counts_and_orders_differ(tmp_path):
    def sample(loss, history, selected):
        return [Token(role=0), *[Token(loss=loss, history_loss=history, selected=one) for one in selected]]

    write_file(
        tmp_path / "step_0000001.parquet", [(1, sample(9.0, 0.0, [False])), (2, sample(1.0, 1.0, [False, True]))]
    )
    write_file(
        tmp_path / "step_0000002.parquet", [(1, sample(2.0, 0.5, [False, True, True])), (3, sample(5.0, 5.0, [True]))]
    )
    files = find_records(tmp_path)
    orders = {}
    for order in ("dropped", "drift", "loss"):
        export(files, Texts(None), None, tmp_path / f"{order}.jsonl", order)
        orders[order] = [one["sample"] for one in read(tmp_path / f"{order}.jsonl")]
    assert orders == {"dropped": [2, 1, 3], "drift": [1, 2, 3], "loss": [3, 1, 2]}
    first = read(tmp_path / "drift.jsonl")[0]
    assert (first["step"], first["drift"], first["dropped_share"], first["num_response"]) == (2, 1.5, 0.3333, 3)
    assert (first["text"], first["row"], first["note"]) == (None, None, NO_DATA)


def test_a_sample_twice_in_a_batch_has_its_text_once(tmp_path):
    rows = [(3, place, Token(place, text=text)) for place, text in enumerate("abc") for _ in range(2)]
    files = find_records(write_rows(tmp_path / "r.parquet", rows))
    assert export(files, texts_in_records(files), None, tmp_path / "d.jsonl") == (1, 0)
    assert read(tmp_path / "d.jsonl")[0]["text"] == "abc"


def test_bytes_become_characters_and_what_only_looks_so_stays():
    assert joined(["a", "\\xe2\\x88", "\\x91", " b"]) == "a∑ b"
    assert joined(["\\xe2", "x"]) == "\ufffdx"
    assert joined(["\\x", "\\xE2", "e2"]) == "\\x\\xE2e2"


def test_half_of_a_pair_of_surrogates_is_written(prepared, tmp_path):
    folder, _ = prepared
    (tmp_path / "s.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "x": "\\ud800"}\n'
    )
    run([tmp_path / "s.jsonl"], folder / "tokenizer", tmp_path / "data")
    store = SampleStore(tmp_path / "data")
    files = find_records(write_file(tmp_path / "r.parquet", [(0, [Token()] * len(store.tokens(0)))]))
    export(files, Texts(None), PreparedData.open(tmp_path / "data"), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[0]["row"]["x"] == "\ud800"


def test_sources_of_samples_that_the_data_does_not_have(prepared):
    data = PreparedData.open(prepared[0] / "data")
    assert data.sources(np.array([0, 5, 99, -1])) == ["a", "b", None, None]
