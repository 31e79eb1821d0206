"""Shares, split and duplicates: what is kept is exact, and depends on neither workers nor chunks."""

import json

import numpy as np
import pytest

from megatron_sstoken.data import prepare as prepare_module
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.mixing import Plan, draw
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.summary import summary
from tests.helpers.preparation import run
from tests.helpers.toy import exchange, write_rows


def rows(count, name):
    return [{"messages": exchange(f"{name} {number}", f"answer {number}")} for number in range(count)]


def samples(folder):
    store = SampleStore(folder)
    return [tuple(store.tokens(index)) for index in range(len(store))]


def labels(folder):
    store = SampleStore(folder)
    return [store.manifest.labels[number] for number in store.labels]


LABELS = np.array([0] * 60 + [1] * 20 + [2] * 5, dtype=np.int32)
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("shares", "repeat", "counts"),
    [
        ({"a": 1, "b": 1, "c": 0}, False, [20, 20, 0]),
        ({"a": 0.75, "b": 0.25, "c": 0}, False, [60, 20, 0]),
        ({"a": 80, "b": 10, "c": 10}, False, [40, 5, 5]),
        ({"a": 1, "b": 1, "c": 0}, True, [60, 60, 0]),
        ({"a": 1, "b": 2, "c": 1}, True, [60, 120, 60]),
        ({"a": 0, "b": 1, "c": 1.1}, True, [0, 20, 22]),
    ],
)
def test_shares_are_exact(shares, repeat, counts):
    times = draw(LABELS, NAMES, Plan(shares, repeat))
    assert [int(times[number == LABELS].sum()) for number in range(3)] == counts
    for number in range(3):
        own = times[number == LABELS]
        assert own.max() - own.min() <= 1, "no sample is taken twice before all are taken once"


def test_the_seed_decides_what_is_drawn_and_nothing_else():
    plan = Plan({"a": 1, "b": 1, "c": 0})
    first = draw(LABELS, NAMES, plan)
    assert (first == draw(LABELS, NAMES, plan)).all()
    assert (first != draw(LABELS, NAMES, Plan(plan.shares, seed=1))).any()
    other = draw(LABELS[:80], NAMES[:2], Plan({"a": 1, "b": 1}))
    assert (first[:80] == other).all(), "another source changes nothing"
    assert sorted(np.flatnonzero(first[:60])) != list(range(20)), "not the first ones"


def test_a_source_of_duplicates_alone_is_told():
    plan = Plan({"a": 1, "b": 1}, deduplicate=True)
    with pytest.raises(
        ValueError, match="no sample of b; .*, or, if all of its samples are duplicates, name its --input"
    ):
        draw(np.zeros(3, np.int32), ["a"], plan)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"a": 1, "b": 1}, r"no share for c \(0 leaves it out\); there is a \(60\), b \(20\), c \(5\)"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "there is no sample of d; there is a"),
    ],
)
def test_labels_and_shares_must_fit(shares, told):
    with pytest.raises(ValueError, match=told):
        draw(LABELS, NAMES, Plan(shares))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shares": {"a": -1}}, "--mix: a=-1 must be at least 0"),
        ({"shares": {"a": float("nan")}}, "must be at least 0"),
        ({"shares": {"a": 0}}, "no share is above 0"),
        ({"repeat": True}, "--mix_repeat: needs --mix"),
        ({"split": 1.0}, "--split: 1.0 must be at least 0 and below 1"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_impossible_plans(options, told):
    with pytest.raises(ValueError, match=told):
        Plan(**options)


def test_shares_on_the_command_line():
    assert Plan.parse_shares(["a=0.5", "b=c=2"]) == {"a": 0.5, "b=c": 2.0}
    for text in ("a", "=1", "a=x"):
        with pytest.raises(ValueError, match="must read name=share"):
            Plan.parse_shares([text])
    with pytest.raises(ValueError, match="each name once"):
        Plan.parse_shares(["a=1", "a=2"])


def test_mixed_sources(tokenizer, tmp_path, monkeypatch):
    """Rows keep their place in the input; weights of the store, labels and the notes say what was taken."""
    a, b = write_rows(tmp_path / "a.jsonl", rows(30, "a")), write_rows(tmp_path / "b.jsonl", rows(10, "b"))
    for workers in (1, 2):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 300 * workers)
        plan = Plan({"math": 0.5, "b": 0.5}, split=0.3)
        manifest = run([f"math={a}", b], tokenizer, tmp_path / f"out{workers}", plan=plan, workers=workers)
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "out1", tmp_path / "out2")
    )
    assert first == second and not [path for path in tmp_path.iterdir() if "partial" in path.name]
    told = [*labels(tmp_path / "out1" / "train"), *labels(tmp_path / "out1" / "validation")]
    assert sorted(told) == ["b"] * 10 + ["math"] * 10
    store = SampleStore(tmp_path / "out1" / "train")
    assert (np.diff(store.rows) > 0).all()
    assert manifest.notes == {"samples of `math` left out by --mix": 20}
    text = summary(tmp_path / "out1")
    assert "20  samples of `math` left out by --mix" in text and "math 10 (50.0%)" in text
    assert len(manifest.sources) == 2 and "rows  " not in text
    whole = run([f"math={a}", b], tokenizer, tmp_path / "whole")
    assert whole.num_samples == 40
    every = dict(zip(SampleStore(tmp_path / "whole").rows.tolist(), samples(tmp_path / "whole"), strict=True))
    assert [every[row] for row in store.rows.tolist()] == samples(tmp_path / "out1" / "train")


def test_sources_repeat_where_asked(tokenizer, tmp_path):
    a, b = write_rows(tmp_path / "a.jsonl", rows(9, "a")), write_rows(tmp_path / "b.jsonl", rows(4, "b"))
    manifest = run([a, b], tokenizer, tmp_path / "out", plan=Plan({"a": 1, "b": 1}, repeat=True))
    assert sorted(labels(tmp_path / "out")) == ["a"] * 9 + ["b"] * 9
    assert manifest.notes == {"repetitions of samples of `b` by --mix_repeat": 5}


def test_names_that_do_not_fit_are_told_before_any_work(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sstoken.data.prepare.load_tokenizer", lambda *_: pytest.fail("work"))
    a = write_rows(tmp_path / "a.jsonl", rows(3, "a"))
    for names in ({"a": 1, "c": 1}, {"c": 1}):
        with pytest.raises(ValueError, match=r"has the names .*, and --input a: they must be the same"):
            run([f"a={a}"], tokenizer, tmp_path / "out", plan=Plan(names))


def test_equal_conversations_lie_on_one_side(tokenizer, tmp_path):
    """Whatever their order and how often they occur."""
    every = rows(60, "a")
    once = write_rows(tmp_path / "once.jsonl", every)
    often = write_rows(tmp_path / "often.jsonl", [*reversed(every), *every])
    run([once], tokenizer, tmp_path / "out1", plan=Plan(split=0.2))
    run([often], tokenizer, tmp_path / "out2", plan=Plan(split=0.2))
    for part in ("train", "validation"):
        assert set(samples(tmp_path / "out1" / part)) == set(samples(tmp_path / "out2" / part))
    held = samples(tmp_path / "out1" / "validation")
    assert 4 <= len(held) <= 22 and not set(held) & set(samples(tmp_path / "out1" / "train"))
    assert f"60 (train {60 - len(held)}, validation {len(held)})" in summary(tmp_path / "out1")


def test_a_split_that_leaves_nothing(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(3, "a"))
    with pytest.raises(ValueError, match="--split: 1e-06 of 3 samples leaves none for validation"):
        run([path], tokenizer, tmp_path / "out", plan=Plan(split=1e-6))
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_duplicates(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*rows(5, "a"), *rows(7, "a")])
    manifest = run([path], tokenizer, tmp_path / "out", plan=Plan(deduplicate=True))
    assert SampleStore(tmp_path / "out").rows.tolist() == [0, 1, 2, 3, 4, 10, 11]
    assert manifest.notes == {"duplicates left out by --deduplicate": 5}
    table = summary(tmp_path / "out")
    assert table.startswith("rows             12\nsamples          7\n") and "5  duplicates left out" in table
    assert run([path], tokenizer, tmp_path / "all").num_samples == 12


def test_two_folders_are_overwritten_as_one_is(tokenizer, tmp_path):
    path, out = write_rows(tmp_path / "a.jsonl", [*rows(40, "a"), {"x": 1}]), tmp_path / "out"
    split = {"plan": Plan(split=0.3), "on_bad_row": "skip"}
    run([path], tokenizer, out, on_bad_row="skip")
    run([path], tokenizer, out, overwrite=True, **split)
    assert sorted(file.name for file in out.iterdir()) == ["skipped.jsonl", "train", "validation"]
    assert json.loads((out / "skipped.jsonl").read_text())["line"] == 41
    for place in (out / "mine", out / "train" / "mine"):
        place.write_text("x")
        with pytest.raises(ValueError, match="mine was not made by this tool"):
            run([path], tokenizer, out, overwrite=True)
        place.unlink()
    run([path], tokenizer, out, overwrite=True, **split)
    (out / "validation" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="out was not made by this tool"):
        run([path], tokenizer, out, overwrite=True)


def test_sources_that_are_addresses_of_single_rows(tokenizer, tmp_path, monkeypatch):
    """Labels are few: rows that name more have the name of their file, which the summary tells."""
    monkeypatch.setattr(prepare_module, "MOST_LABELS", 3)
    named = [row | {"source": f"https://example.org/{number}"} for number, row in enumerate(rows(6, "a"))]
    path = write_rows(tmp_path / "web.jsonl", named)
    run([path], tokenizer, tmp_path / "out")
    assert labels(tmp_path / "out") == [*(row["source"] for row in named[:3]), "web", "web", "web"]
    assert "         3  rows name more than 3 sources" in summary(tmp_path / "out")
