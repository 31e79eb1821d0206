"""History losses: every token's value, resumed after a stop with another batch size, cut and dropped samples as NaN.

Only what a run visits is scored, and more where a later one needs it.
"""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import PackOrder, filter_samples
from megatron_sstoken.data.column import TokenColumn
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.integrity import damage
from megatron_sstoken.lock import Lock
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store
from tests.reference.hf_reference import token_losses

SAMPLES = make_samples(21, seed=8)


def samples_held(data: str, path) -> np.ndarray:
    """bool [num_samples]: which samples a store holds."""
    offsets = SampleStore(data).offsets
    return TokenColumn(path).holds(offsets[:-1], offsets[1:])


def score_history(rank, settings, stop_after):
    """Score, stopping after some batches by an exception; returns how many were scored, negative where it was stopped."""
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.passes import scoring
    from megatron_sstoken.validate.agree import agreed_plan

    original, done = scoring.score_batch, []

    def score_batch(*args):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args)

    scoring.score_batch = score_batch
    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, 0)
    try:
        open_history(plan, layout)
    except KeyboardInterrupt:
        return -len(done)
    finally:
        scoring.score_batch = original
    return len(done)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    model = make_model(folder / "model")
    data = make_store(folder / "data", SAMPLES, [0, *range(len(SAMPLES) - 1)])  # one row is there twice
    reference = load_model(model)
    return folder, model, data, [token_losses(reference, sample.tokens) for sample in SAMPLES]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_values_after_a_stop_and_another_batch_size(bench, tmp_path, too_long):
    folder, model, data, losses = bench
    path, length = str(tmp_path / "losses"), 40

    def settings(global_batch, packing):
        return make_settings(
            model,
            data,
            history__store=path,
            data__sequence_length=length,
            data__too_long=too_long,
            data__packing=packing,
            training__global_batch_size=global_batch,
            logging__context_loss=True,
        )

    assert run_distributed(score_history, 2, settings(4, False), 1) == [-1, -1]
    assert samples_held(data, path).sum() == 4, "those of the batch that was scored"
    assert run_distributed(score_history, 1, settings(6, True), None)[0] > 0
    assert damage(tmp_path / "losses") == []
    store, column = SampleStore(data), TokenColumn(path)
    for index, expected in enumerate(losses):
        wanted = np.array([np.nan if loss is None else loss for loss in expected])
        wanted[length:] = np.nan
        if too_long == "drop" and len(wanted) > length:
            wanted[:] = np.nan
        found = column.values(store.offsets[index], store.offsets[index + 1])
        np.testing.assert_allclose(found, wanted, atol=5e-4)


def told_while_scoring(rank, settings):
    """What each process is told where history cannot be scored."""
    from megatron_sstoken.config import SettingsError

    try:
        score_history(rank, settings, None)
    except SettingsError as error:
        return error.problems
    return []


def test_losses_that_are_not_finite_end_the_scoring(bench, tmp_path):
    folder, model, data, _ = bench
    broken = shutil.copytree(model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = make_settings(str(broken), data, history__store=str(tmp_path / "losses"), parallel__pipeline=2)
    told = run_distributed(told_while_scoring, 2, settings)
    assert told[0] == told[1] and "is nan: check the weights of history.hf_path" in told[0][0]
    assert not samples_held(data, tmp_path / "losses").any()


def visits(data: str, num_steps: int, global_batch: int) -> np.ndarray:
    """bool [num_samples]: which samples a run of the default order reads."""
    samples = filter_samples(SampleStore(data), 2048, "truncate")
    order = PackOrder(samples, seed=1234, shuffle=True)
    visited = np.zeros(len(samples.lengths), dtype=bool)
    visited[np.concatenate([order.pack(number) for number in range(num_steps * global_batch)])] = True
    return visited


def score_in_turn(rank, many: list[Settings]) -> list[int]:
    """How many batches are scored for each of several runs, in one process."""
    from megatron_sstoken.parallel import reset_layout

    found = []
    for settings in many:
        found.append(score_history(rank, settings, None))
        reset_layout()
    return found


def test_a_store_grows_by_the_samples_that_runs_visit(bench, tmp_path):
    """Two steps of four samples, then three, then the same again, then an epoch: 2, 1, 0 and the batches of the rest."""
    folder, model, data, losses = bench
    path = tmp_path / "losses"

    def settings(steps, **changes):
        changes = {"training__steps": steps, "training__global_batch_size": 4, "history__store": str(path)} | changes
        return make_settings(model, data, **changes)

    assert run_distributed(score_in_turn, 1, [settings(2)]) == [[2]]
    assert samples_held(data, path).tolist() == visits(data, 2, 4).tolist() and visits(data, 2, 4).sum() == 8
    eight = TokenColumn(path)
    assert run_distributed(score_in_turn, 2, [settings(3), settings(3)]) == [[1, 0], [1, 0]]
    assert samples_held(data, path).tolist() == visits(data, 3, 4).tolist() and visits(data, 3, 4).sum() == 12
    assert damage(path) == []
    assert run_distributed(score_in_turn, 1, [settings(6), settings(9)]) == [[3, 0]], "an epoch holds all"
    assert samples_held(data, path).all() and damage(path) == []
    store, column = SampleStore(data), TokenColumn(path)
    for index, expected in enumerate(losses):
        start, stop = store.offsets[index : index + 2]
        wanted = np.array([np.nan if loss is None else loss for loss in expected])
        wanted[store.roles(index) == 0] = np.nan
        np.testing.assert_allclose(column.values(start, stop), wanted, atol=5e-4)
        if eight.holds(start[None], stop[None])[0]:
            np.testing.assert_array_equal(column.values(start, stop), eight.values(start, stop), "never changes")
        else:
            assert np.isnan(eight.values(start, stop)).all(), "the zeros of a sparse file are no losses"


def test_a_store_of_version_1_is_read_as_it_is(bench, tmp_path):
    """It is complete, and lies where version 1 put it: its name says how many samples it holds."""
    from megatron_sstoken.history.frozen import history_path

    folder, model, _, _ = bench
    data = make_store(tmp_path / "data", SAMPLES)
    settings = make_settings(model, data, training__steps=1)
    run_distributed(score_in_turn, 1, [make_settings(model, data, training__steps=30)])
    (new,) = [path for path in (tmp_path / "data" / "history").iterdir() if path.is_dir()]
    header = json.loads((new / "manifest.json").read_text())
    identity = header["identity"] | {"num_scored": len(SAMPLES)}
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(new / "values.bin", old)
    (old / "manifest.json").write_text(json.dumps(header | {"format_version": 1, "identity": identity}))
    shutil.rmtree(new)
    shutil.copytree(old, history_path(tmp_path / "data", identity))
    stored = make_settings(model, data, training__steps=1, history__store=str(old))
    assert run_distributed(score_in_turn, 1, [settings, stored]) == [[0, 0]]
    assert not new.exists()
    (old / "manifest.json").write_text(
        json.dumps(header | {"format_version": 1, "identity": identity | {"num_scored": 20}})
    )
    told = run_distributed(told_while_scoring, 1, stored)
    assert "num_scored is 20, must be 21: move it away" in told[0][0]


def score_together(rank, settings: list[Settings], path) -> tuple[int, str | None]:
    """On two processes that are two runs: batches scored by each, and who held the lock at the end."""
    import torch.distributed as dist

    from megatron_sstoken.parallel import start_processes

    dist.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_PORT="0")
    start_processes()
    return score_history(0, settings[rank], None), Lock(path).holder()


def test_two_runs_at_once_score_each_sample_once(bench, tmp_path):
    """One waits for the other's lock and finds its samples there, whichever is first: 3 batches in all, or 3 and 2 of 5."""
    folder, model, data, _ = bench
    path = tmp_path / "losses"
    common = {"training__global_batch_size": 4, "history__store": str(path)}
    both = [make_settings(model, data, training__steps=steps, **common) for steps in (3, 2)]
    found = run_distributed(score_together, 2, both, f"{path}.lock")
    assert [holder for _, holder in found] == [None, None]
    assert sum(count for count, _ in found) == 3
    assert samples_held(data, path).tolist() == visits(data, 3, 4).tolist() and damage(path) == []
