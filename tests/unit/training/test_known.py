"""What is known before training: made once, told on mistakes, and a choice over all data against a sort."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.checkpoint.manifest import differences
from megatron_sstoken.config import SettingsError
from megatron_sstoken.data import response_chunks
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.lock import Lock
from megatron_sstoken.selection.methods import Method, find_method, random_scores
from megatron_sstoken.training.known import NOTHING, open_known
from megatron_sstoken.training.resume import objective_of
from megatron_sstoken.validate.run import plan_run
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

ROWS = [0, 2, 3, 3, 7, 9]
shifted = Method(lambda x: x["external"] - 3.0, needs=frozenset({"external"}), before_training=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    make_model(folder / "model")
    samples = make_samples(len(ROWS), seed=2)
    samples[3] = samples[2]
    make_store(folder / "data", samples, ROWS)
    return folder


@pytest.fixture(scope="module")
def layout():
    """As much of a layout of one process as is used."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(rank=0, control=dist.group.WORLD)
    dist.destroy_process_group()


def scores_file(folder, *, seed=0, drop=0) -> str:
    """Random scores of all tokens but the last `drop` rows."""
    store = SampleStore(folder / "data")
    sample = np.concatenate([np.full(n, row) for n, row in zip(store.lengths, store.rows, strict=True)])
    position = np.concatenate([np.arange(n) for n in store.lengths])
    keep = slice(len(sample) - drop)
    values = np.random.default_rng(seed).integers(0, 6, len(sample)).astype(np.float32)
    values[sample == 3] = 2.0  # the file repeats this row as the data does
    table = {"sample": sample[keep], "position": position[keep], "score": values[keep], "selected": values[keep] > 3}
    path = folder / f"scores-{seed}-{drop}.parquet"
    pq.write_table(pa.table(table), path)
    return str(path)


def plan_of(folder, **changes):
    settings = make_settings(str(folder / "model"), str(folder / "data"), **changes)
    return plan_run(settings, 1)


def response_of(plan):
    """(number of the sample in the store, position, place) of all response tokens with a loss."""
    store, samples = plan.train.store, plan.train.samples
    return [
        (int(index), position, int(store.offsets[index]) + position)
        for index in samples.indices
        for position in range(1, samples.lengths[index])
        if store.roles(int(index))[position]
    ]


def chosen_by(plan, score, share=0.6):
    """The best share of all response tokens by a function of (sample number, position, place), ties to the first."""
    tokens = sorted(response_of(plan), key=lambda token: (-score(*token), token))
    return {place for _, _, place in tokens[: int(np.ceil(round(share * len(tokens), 9)))]}


def open_quietly(plan, layout):
    return open_known(plan, layout, HistorySource())


def test_nothing_is_asked_for(folder, layout):
    assert open_quietly(plan_of(folder), layout) == NOTHING and NOTHING.folders() == []


@pytest.mark.parametrize("method", ["external", f"{__name__}.shifted", "random"])
def test_a_choice_over_all_data(folder, layout, method, monkeypatch, capsys):
    monkeypatch.setattr(response_chunks.response_chunks, "__defaults__", (20,))
    more = {} if method == "random" else {"selection__external": scores_file(folder), "selection__rule": "top"}
    plan = plan_of(folder, selection__method=method, selection__scope="dataset", **more)
    known = open_quietly(plan, layout)
    number = plan.train.store.manifest.num_tokens
    column = known.values["chosen"].values(0, number)
    if method == "random":
        rows = torch.from_numpy(plan.train.store.rows)
        wanted = chosen_by(plan, lambda i, p, _: float(random_scores(rows[i], torch.tensor(p), 1234, 0)))
    else:
        values = known.values["external"].values(0, number)
        wanted = chosen_by(plan, lambda i, p, place: float(values[place]))
    assert set(np.flatnonzero(column == 1)) == wanted
    assert set(np.flatnonzero(~np.isnan(column))) == {place for _, _, place in response_of(plan)}
    told = capsys.readouterr().out
    assert (
        f"scope dataset: {len(wanted)} of {len(response_of(plan))} response tokens are selected, with scores of" in told
    )
    monkeypatch.setattr("megatron_sstoken.training.known.write_column", None)  # it is there by now
    assert open_quietly(plan, layout).folders() == known.folders()
    capsys.readouterr()


def test_a_run_that_makes_the_same_column_is_waited_for(folder, layout, monkeypatch, capsys):
    """While it does, the lock is its own; then its column is taken."""
    plan = plan_of(folder, selection__method="external", selection__external=scores_file(folder, seed=5))
    (made,) = open_quietly(plan, layout).folders()
    aside = made.rename(made.with_name("aside"))
    other = Lock(f"{made}.lock")
    assert other.take() is None
    monkeypatch.setattr("megatron_sstoken.history.frozen.time.sleep", lambda seconds: aside.rename(made))
    monkeypatch.setattr("megatron_sstoken.training.known.write_column", None)
    assert open_quietly(plan, layout).folders() == [made]
    other.release()
    assert f"token columns: waiting for process {os.getpid()} on " in capsys.readouterr().out


def test_other_content_has_another_folder(folder, layout):
    given = {"selection__method": "external", "selection__rule": "top"}
    paths, digests = set(), []
    for seed in (1, 2):
        plan = plan_of(folder, selection__external=scores_file(folder, seed=seed), selection__scope="dataset", **given)
        known = open_quietly(plan, layout)
        paths |= set(known.folders())
        digests.append(known.digests)
    assert len(paths) == 4 and {path.parent.name for path in paths} == {"external", "chosen"}
    changes = differences(objective_of(plan, digests[0]), objective_of(plan, digests[1]))
    assert [change.split(":")[0] for change in changes] == [
        "known.external",
        "known.chosen",
    ]  # what a resumed run is told


def test_tokens_without_a_score(folder, layout, capsys):
    path = scores_file(folder, drop=9)
    plan = plan_of(folder, selection__method="external", selection__external=path, selection__rule="top")
    missing = [place for _, _, place in response_of(plan) if place >= plan.train.store.manifest.num_tokens - 9]
    with pytest.raises(SettingsError) as error:
        open_quietly(plan, layout)
    assert f"has no score of {len(missing)} response tokens (first: sample 9, position " in str(error.value)
    # What is not marked is not selected; and a run that cuts the samples there needs no score of what it cuts.
    given = plan_of(folder, selection__method="external", selection__external=path)
    assert open_quietly(given, layout).values.keys() == {"chosen"}
    short = replace(plan.train.samples, indices=plan.train.samples.indices[:-1])
    assert open_quietly(replace(plan, train=replace(plan.train, samples=short)), layout).values.keys() == {"external"}
    capsys.readouterr()


def test_a_score_that_is_not_a_number(folder, layout, monkeypatch):
    monkeypatch.setattr(f"{__name__}.shifted", replace(shifted, score=lambda x: x["external"] * float("nan")))
    plan = plan_of(
        folder,
        selection__method=f"{__name__}.shifted",
        selection__external=scores_file(folder),
        selection__scope="dataset",
    )
    find_method.cache_clear()
    with pytest.raises(
        SettingsError, match=r"selection.scope=dataset: the score of sample 0 \(row number in the input\)"
    ):
        open_quietly(plan, layout)
    find_method.cache_clear()


def test_mistakes_in_a_file_are_settings_errors(folder, layout, tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"sample": [5], "position": [1], "selected": [True]}), path)
    plan = plan_of(folder, selection__method="external", selection__external=path)
    with pytest.raises(SettingsError, match="1 rows name a sample that data.train does not hold"):
        open_quietly(plan, layout)
    assert not list((folder / "data" / "external").glob("*.partial"))
