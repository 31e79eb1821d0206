"""Settings that cannot work end the program at once, with one clear message and an exit code, on all ranks."""

import os

import numpy as np
import pytest

from megatron_sstoken import lock as lock_module
from megatron_sstoken.data.store import StoreWriter
from megatron_sstoken.lock import Lock
from tests.helpers import cli, programs
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mistakes")
    make_model(path / "model")
    make_model(path / "other", seed=5)
    make_store(path / "data", make_samples(8))
    return path


def train(folder, num_ranks=2, data="data", **changes):
    settings = make_settings(str(folder / "model"), str(folder / data), **changes)
    return programs.run("megatron_sstoken.train", cli.settings_arguments(settings), num_ranks)


def assert_refused(result, *messages):
    assert result.returncode != 0
    for message in messages:
        assert result.stderr.count(f"error: {message}") == 1, result.stderr
    assert "megatron_sstoken/" not in result.stderr, f"a traceback of ours:\n{result.stderr}"


def test_several_mistakes_are_told_together_by_all_ranks(folder):
    result = train(
        folder,
        parallel__tensor=2,
        data__sequence_length=4096,
        training__global_batch_size=9,
        training__micro_batch_size=2,
    )
    assert_refused(
        result,
        "data.sequence_length=4096 is longer than the model's max_position_embeddings=512: use 512 or less",
        "training.global_batch_size=9 is not a multiple of training.micro_batch_size=2 × data parallel size 1 = 2: use 8 or 10",
    )
    assert result.returncode == 2
    assert all(line.startswith("error: ") for line in result.stderr.splitlines()), result.stderr


def test_a_history_store_of_other_weights_is_refused(folder):
    store = str(folder / "history")
    assert train(folder, 1, history__store=store).returncode == 0
    result = train(folder, 1, history__store=store, history__hf_path=str(folder / "other"))
    assert_refused(result, f"history.store={store}: ")
    assert "weights is " in result.stderr


def test_a_history_store_of_other_data_and_tokenizer_is_refused(folder):
    store = str(folder / "history-of-data")
    assert train(folder, 1, history__store=store).returncode == 0
    samples = make_samples(8, seed=4)
    writer = StoreWriter(folder / "other-data")
    for number, sample in enumerate(samples):
        writer.add(np.array(sample.tokens, dtype=np.int32), np.array(sample.roles, dtype=np.uint8), number)
    writer.finalize(
        vocabulary_size=99, eos_token_id=1, tokenizer_fingerprint="another", tokenizer_path="toy", template=None
    )
    result = train(folder, 1, data="other-data", history__store=store)
    assert_refused(result, f"history.store={store}: ")
    assert "data is " in result.stderr and "tokenizer is " in result.stderr


def test_nothing_is_half_written(folder):
    before = sorted(path for path in folder.rglob("*"))
    result = train(folder, 2, parallel__tensor=3, checkpoint__directory=str(folder / "never"))
    assert_refused(
        result, "2 processes cannot be split into parallel.tensor=3 × parallel.pipeline=1 × parallel.context=1 = 3"
    )
    assert sorted(path for path in folder.rglob("*")) == before


def plan_on_uneven_nodes(rank, model, data):
    """What each process is told where `auto` means something else on the second."""
    from megatron_sstoken.config import SettingsError
    from megatron_sstoken.validate import agree

    agree.numerics_of = lambda settings: ("bf16", "bf16 on transformer_engine")[rank]
    try:
        agree.agreed_plan(make_settings(model, data))
    except SettingsError as error:
        return error.problems
    return []


def test_nodes_that_would_compute_differently_are_told(folder):
    told = run_distributed(plan_on_uneven_nodes, 2, str(folder / "model"), str(folder / "data"))
    assert told[0] == told[1] and "is bf16 on process 0 and bf16 on transformer_engine on process 1" in told[0][0]


def plan_on_nodes_that_differ(rank, model, data, changes):
    """What each process is told where the second has other settings or files."""
    from megatron_sstoken.config import SettingsError
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.resume import resumable_checkpoint
    from megatron_sstoken.validate.agree import agreed_plan

    told = []
    for change in changes:
        values = {"model": model, "data": data} | (change if rank else {})
        paths = {name: values.pop(name) for name in ("model", "data")}
        values = {"checkpoint__directory": f"{model}-run"} | values
        try:
            agreed_plan(make_settings(**paths, **values), check=resumable_checkpoint)
            told.append([])
        except SettingsError as error:
            told.append(error.problems)
        reset_layout()
    return told


DIFFERENCES = {
    "optimizer.learning_rate": {"optimizer__learning_rate": 7e-5},
    "selection.rho": {"selection__rho": 0.25},
    "selection.method": {"selection__method": "full"},
    "training.seed": {"training__seed": 3},
    "training.steps": {"training__steps": 5},
    "training.global_batch_size": {"training__global_batch_size": 4},
    "checkpoint.save_every": {"checkpoint__save_every": 1},
    "data.sequence_length": {"data__sequence_length": 64},
}


def test_nodes_with_other_settings_are_told_what_differs(folder):
    changes = [{}, *DIFFERENCES.values()]
    told = run_distributed(plan_on_nodes_that_differ, 2, str(folder / "model"), str(folder / "data"), changes)
    assert told[0] == told[1] and told[0][0] == []
    for name, (problem,) in zip(DIFFERENCES, told[0][1:], strict=True):
        assert problem.startswith(f"{name} is ") and " on process 0 and " in problem, problem


def plan_in_own_places(rank, places):
    """What each process is told where the same relative paths lead to files of its own."""
    import os

    os.chdir(places[rank])
    os.environ["LOCAL_RANK"] = "0"  # each is the first of its node
    return plan_on_nodes_that_differ(rank, "model", "data", [{}])[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("data", "the content of data.train is "),
        ("model", "the content of the starting weights is "),
        ("run", "checkpoint.directory=model-run of process 1 is not that of process 0"),
    ],
)
def test_nodes_with_other_files_are_told_what_differs(folder, tmp_path, other, message):
    places = [tmp_path / "node0", tmp_path / "node1"]
    for number, place in enumerate(places):
        place.mkdir()
        seed = number if other == "data" else 0
        make_store(place / "data", make_samples(8, seed=seed))
        (place / "model").symlink_to(folder / ("other" if other == "model" and number else "model"))
    if other != "run":
        (tmp_path / "run").mkdir()
        for place in places:
            (place / "model-run").symlink_to(tmp_path / "run")
    told = run_distributed(plan_in_own_places, 2, places)
    assert told[0] == told[1] and told[0][0].startswith(message), told


@pytest.mark.parametrize("number", [2, 4])
def test_runs_of_a_sweep_that_start_together_score_history_once(folder, tmp_path, number):
    """One of them scores, the others wait for it and use what it has scored."""
    store = tmp_path / "history"
    running = []
    for run, rho in enumerate((0.3, 0.5, 0.7, 0.9)[:number]):
        settings = make_settings(
            str(folder / "model"), str(folder / "data"), history__store=str(store), selection__rho=rho
        )
        arguments = cli.settings_arguments(settings)
        running.append(programs.start("megatron_sstoken.train", arguments, 1, tmp_path / f"out{run}"))
    ended = [program.wait()[0] for program in running]
    assert [code for code, _ in ended] == [0] * number, ended
    assert sum("history losses: 100%" in output for _, output in ended) == 1, "one scores"
    assert not list(tmp_path.glob("*.lock")), "no lock is left"


def test_two_runs_in_one_checkpoint_directory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 1.0)  # a second run waits for a sign of life
    with Lock(tmp_path / "run" / "run.lock") as lock:
        assert lock.take() is None
        result = train(folder, 1, checkpoint__directory=str(tmp_path / "run"))
    assert_refused(
        result, f"checkpoint.directory={tmp_path / 'run'} is in use by another run (process {os.getpid()} on "
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == []
