"""Every kind of file gives the same rows; what is none of them, or damaged, is one error."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import os

import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.inputs.files import find_files, split_label

ROWS = [
    {"messages": [{"role": "user", "content": f'say "{n}", [{{}} \\ é\n'}, {"role": "assistant", "content": "x" * n}]}
    for n in range(40)
]


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table():
    return pyarrow.Table.from_pylist(ROWS)


def in_parquet():
    sink = io.BytesIO()
    parquet.write_table(table(), sink, row_group_size=16)
    return sink.getvalue()


def in_stream():
    sink = io.BytesIO()
    with ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=7)
    return sink.getvalue()


def in_feather():
    sink = io.BytesIO()
    feather.write_feather(table(), sink, compression="zstd")
    return sink.getvalue()


def in_cells(delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["messages"])
    writer.writerows([json.dumps(row["messages"])] for row in ROWS)
    return text.getvalue().encode()


KINDS = {
    "a.jsonl": lines(ROWS),
    "windows.jsonl": b"\xef\xbb\xbf" + lines(ROWS, "\r\n"),
    "compact.json": json.dumps(ROWS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=4).encode(),
    "row_a_line.json": b"[\n" + lines(ROWS, ",\n").rstrip(b",\n") + b"\n]\n",
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "two_members.jsonl.gz": gzip.compress(lines(ROWS[:9])) + gzip.compress(lines(ROWS[9:])),
    "a.jsonl.zst": pyarrow.compress(lines(ROWS), codec="zstd", asbytes=True),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.parquet": in_parquet(),
    "a.arrow": in_stream(),
    "a.feather": in_feather(),
    "a.csv": in_cells(","),
    "a.tsv": in_cells("\t"),
    "a.csv.gz": gzip.compress(in_cells(",")),
    "parquet_with_a_wrong_name.jsonl": in_parquet(),
    "array_with_a_wrong_name.jsonl": json.dumps(ROWS, indent=1).encode(),
}


def rows_of(source):
    return [(chunk.where(place), chunk.decode(raw)) for chunk in list(source.chunks()) for place, raw in chunk.rows()]


@pytest.mark.parametrize("size", [1, 700, 1 << 20])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_the_same_rows(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    (source,) = find_files([path])
    assert [row for _, row in rows_of(source)] == ROWS
    assert source.position == source.size == len(KINDS[name])
    digest = hashlib.sha256(KINDS[name]).hexdigest()
    assert source.describe() == {"path": str(path), "size": len(KINDS[name]), "sha256": digest}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a.jsonl", ":3"),
        ("compact.json", ", element 3"),
        ("a.parquet", ", row 3"),
        ("a.arrow", ", row 3"),
        ("a.csv", ":4"),
        ("a.jsonl.gz", ":3"),
    ],
)
def test_the_place_of_a_row(tmp_path, monkeypatch, name, where):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    assert rows_of(find_files([path])[0])[2][0] == f"{path}{where}"


def test_chunks_are_bounded_by_bytes(tmp_path, monkeypatch):
    """One huge row is a chunk of its own; what travels of a large batch of Arrow is its slice alone."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)
    sizes = [10] * 50 + [50_000] + [10] * 50
    rows = [{"prompt": "p", "completion": "x" * size} for size in sizes]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    for name in ("a.parquet", "a.jsonl"):
        (source,) = find_files([tmp_path / name])
        parts = list(source.chunks())
        held = sorted(len(part.stream) if name == "a.parquet" else len(part.content) for part in parts)
        assert held[-1] < 60_000 and all(size < 10_000 for size in held[:-1]), held


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.zip", b"PK\x03\x04....", "zip archive: unpack it"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16: convert it to UTF-8"),
        ("a.parquet", b"nonsense", "is not Parquet, as its name says"),
        ("a.bin", b"\0\1\2", "is of no known kind: give JSON lines"),
        ("a.txt", b"some words", "is of no known kind"),
        ("a.parquet.gz", gzip.compress(in_parquet()), "is Parquet inside gzip: unpack"),
    ],
)
def test_what_is_no_data_is_told_before_any_work(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        find_files([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-10], "cut off or damaged"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS)) + b"more", "cut off or damaged"),
        ("a.jsonl.zst", pyarrow.compress(lines(ROWS), codec="zstd", asbytes=True)[:-10], "cut off or damaged"),
        ("a.parquet", in_parquet()[:-10], "cut off or damaged"),
        ("a.arrow", in_stream()[:-1000], "cut off or damaged"),
        ("a.json", json.dumps(ROWS).encode()[:-1], "ends inside element 40"),
        ("a.json", json.dumps(ROWS).encode()[:-5], "ends inside element 40"),
        ("a.json", b'[{"a": "', "ends inside element 1"),
        ("a.json", json.dumps(ROWS).encode() + b"[1]", r"has '\[' after its array of 40 elements"),
        ("a.json", json.dumps(ROWS).encode() + b"x", "has 'x' after its array"),
        ("a.json", b"[] ]", "has ']' after its array"),
        ("a.json", b'{\n"a": 1},\n{"a": 2}', "has ',' after element 1"),
        ("a.csv", b"a,a\n1,2\n", "two columns `a`"),
        ("a.csv", b"a,\n1,2\n", "a column without a name"),
        ("a.csv", b"", "has no header"),
        ("a.csv", b"prompt;completion\na;b\n", "separated by semicolons, not commas: give commas"),
    ],
)
def test_damaged_files_are_one_error(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    (source,) = find_files([tmp_path / name])
    with pytest.raises(ValueError, match=told):
        rows_of(source)


@pytest.mark.parametrize(
    ("content", "good"),
    [
        (b'[{"a": 1},, {"a": 2}]', 2),
        (b'[{"a": 1}, ]', 1),
        (b'[{"a": 1}, nonsense, {"a": "]"}]', 2),
        (b'{"a": 1\n{"a": 2}\n', 1),
        (b"[1]\n[2]\n", 0),
        (b"[]", 0),
        (b"[ ]", 0),
        (b"[[1, 2], 3]", 0),
    ],
)
def test_bad_values_are_bad_rows(tmp_path, content, good):
    """Nothing between two commas passes unseen, and the rest is read."""
    (tmp_path / "a.json").write_bytes(content)
    found, bad = [], []
    for chunk in find_files([tmp_path / "a.json"])[0].chunks():
        for place, raw in chunk.rows():
            try:
                found.append(chunk.decode(raw))
            except BadRow:
                bad.append(place)
    assert len(found) == good
    assert len(bad) == {b"[]": 0, b"[ ]": 0, b"[1]\n[2]\n": 2, b"[[1, 2], 3]": 2}.get(content, 1)


def test_bad_cells(tmp_path):
    text = (
        b'messages,input\n"[{""role"": ""user""}]",\xff\n"[{\'role\': \'user\'}]",a\n,"two\nlines"\n1,2,3\n\n"[]",[1]\n'
    )
    (tmp_path / "a.csv").write_bytes(text)
    results = []
    for chunk in find_files([tmp_path / "a.csv"])[0].chunks():
        for place, raw in chunk.rows():
            chunk.text(raw).encode()
            try:
                results.append((place, chunk.decode(raw)))
            except BadRow as error:
                results.append((place, str(error)))
    assert [place for place, _ in results] == [2, 3, 4, 6, 8]
    assert results[0][1] == "the cell `input` is not UTF-8" and "pandas' to_csv" in results[1][1]
    assert results[2][1] == {"messages": None, "input": "two\nlines"}
    assert "has 3 cells, and the header 2" in results[3][1]
    assert results[4][1] == {"messages": [], "input": "[1]"}, "text stays text"


def test_cells_of_weights_are_values(tmp_path):
    header = "prompt,completion,weight,train,label,history\n"
    (tmp_path / "a.csv").write_text(header + 'a,1,0.5,True,FALSE,"[[""a"", ""b""]]"\na,2,,,,\na,3,nan,yes,good,[]\n')
    (chunk,) = find_files([tmp_path / "a.csv"])[0].chunks()
    values = [list(chunk.decode(raw).values())[1:] for _, raw in chunk.rows()]
    assert values[0] == ["1", 0.5, True, False, [["a", "b"]]]
    assert values[1:] == [["2", None, None, None, None], ["3", "nan", "yes", "good", []]]


def test_an_empty_file_is_told(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"")
    find_files([tmp_path / "a.jsonl"])
    assert f"{tmp_path / 'a.jsonl'} is empty" in capsys.readouterr().err


def test_nested_columns_become_what_json_would_have_held(tmp_path):
    kind = pyarrow.struct([("role", pyarrow.string()), ("name", pyarrow.string())])
    columns = {
        "messages": pyarrow.array([[{"role": "user"}], [{"role": "tool", "name": "f"}]], pyarrow.list_(kind)),
        "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "texts": pyarrow.array([["a", None], None], pyarrow.list_(pyarrow.string())),
        "label": pyarrow.array(["x", "y"]).dictionary_encode(),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = [row for _, row in rows_of(find_files([tmp_path / "a.parquet"])[0])]
    assert first == {"messages": [{"role": "user"}], "map": {"a": 1}, "texts": ["a", None], "label": "x"}
    assert second == {"messages": [{"role": "tool", "name": "f"}], "map": [], "texts": None, "label": "y"}


def test_folders_and_patterns(tmp_path, capsys):
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.parquet", "more/c.csv.gz", ".hidden.jsonl", "README.md", "dataset_infos.json"):
        (folder / name).write_bytes(KINDS.get(name, KINDS["a.csv.gz"] if "csv" in name else lines(ROWS)))
    found = find_files([folder])
    names = [os.path.relpath(one.path, folder) for one in found]
    assert names == ["a.parquet", "b.jsonl", "more/c.csv.gz"] and {one.stem for one in found} == {"chats"}
    assert (
        capsys.readouterr().err
        == f"note: --input: {folder}: 3 files are read; left out: README.md, dataset_infos.json\n"
    )
    assert [one.stem for one in find_files([f"{folder}/*.*s*l", f"x={folder}/**/*.gz"])] == ["b", "c"]
    assert find_files([f"x={folder}/b.jsonl"])[0].label == "x"
    find_files([folder / "b.jsonl", f"{folder}/*.jsonl"])
    assert "b.jsonl is read more than once" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for path, told in (("empty", "no file with rows"), ("absent", "is not there"), ("*.x", "matches no file")):
        with pytest.raises(ValueError, match=told):
            find_files([tmp_path / path])


def test_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jsonl").write_bytes(b"")
    assert split_label("a=b.jsonl") == (None, "a=b.jsonl") and split_label("a=c.jsonl") == ("a", "c.jsonl")
    assert split_label("/data/a=b/c.jsonl") == (None, "/data/a=b/c.jsonl")
    for name, stem in (("train-00001-of-00002.jsonl", "train"), ("gsm8k.v2.jsonl", "gsm8k.v2")):
        (tmp_path / name).write_bytes(lines(ROWS))
        assert find_files([name])[0].stem == stem


def test_a_snapshot_of_the_hub(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".gitattributes").write_text("words")
    for number in (1, 0):
        (data / f"train-0000{number}-of-00002.parquet").write_bytes(in_parquet())
    assert [os.path.basename(one.path)[:11] for one in find_files([tmp_path])] == ["train-00000", "train-00001"]
    (data / "test-00000-of-00001.parquet").write_bytes(in_parquet())
    with pytest.raises(ValueError, match=r"several splits \(test, train\): name the files, such as '.*/data/train\*'"):
        find_files([tmp_path])
    assert len(find_files([data / "train*"])) == 2


def test_a_saved_data_set(tmp_path):
    """As `datasets.save_to_disk` leaves it."""
    train = tmp_path / "train"
    train.mkdir()
    for name in ("data-00001-of-00002.arrow", "data-00000-of-00002.arrow"):
        (train / name).write_bytes(in_stream())
    (train / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (0, 1)]}
    (train / "state.json").write_text(json.dumps(state))
    found = find_files([train])
    assert [row for one in found for _, row in rows_of(one)] == ROWS * 2
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=f"several splits: name one of them \\({train}, "):
        find_files([tmp_path])
    (train / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="lacks data-00001-of-00002.arrow"):
        find_files([train])
    (train / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(ValueError, match="lacks x.arrow"):
        find_files([train])


def test_pipes_and_unreadable_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe or device, and must be a file"):
        find_files([tmp_path / "pipe"])
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root reads everything
    with pytest.raises(ValueError, match="cannot be read: let this user read it"):
        find_files([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    path = tmp_path / name
    path.write_bytes(KINDS.get(name, KINDS["compact.json"]))
    parts = find_files([path])[0].chunks()
    next(parts)
    with open(path, "ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match="changed while it was read|cut off or damaged"):
        list(parts)
