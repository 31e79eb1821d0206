"""Watched samples: what they tell is what steps see of the same samples with the same weights, and training never notices."""

import hashlib

import numpy as np
import pytest

from megatron_sstoken.training.records import read_records
from megatron_sstoken.training.token_log import watched_samples
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

NUM_SAMPLES, GLOBAL_BATCH, EPOCH = 8, 4, 2
"""An epoch has `EPOCH` steps, and without shuffling the first samples come again after it."""
WATCHED = 3
SOURCES = {
    "frozen": {"history__source": "frozen"},
    "adapters_off": {"history__source": "adapters_off", "lora__rank": 2},
    "snapshot": {"history__source": "snapshot", "history__every": 2},
    "ema": {"history__source": "ema", "history__decay": 0.5},
    "previous_visit": {"history__source": "previous_visit", "history__first_visit": "full"},
    "dropout": {"history__source": "adapters_off", "lora__rank": 2, "lora__dropout": 0.3},
}
"""The last: random states move, and what a step sees is with dropout."""
INTERLEAVED = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
CASES = [
    pytest.param(({}, ["snapshot", "previous_visit", "dropout"]), id="dp2"),
    pytest.param(({}, ["frozen", "adapters_off", "ema"]), id="dp2-others", marks=pytest.mark.slow),
    pytest.param((INTERLEAVED, ["frozen", "snapshot", "previous_visit"]), id="pp2-vpp2", marks=pytest.mark.slow),
    pytest.param(({"parallel__tensor": 2}, ["ema", "dropout"]), id="tp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES, seed=3, longest=30))
    return folder


def settings_in(folder, directory, **changes):
    values = {
        "training__steps": 2 * EPOCH,
        "training__global_batch_size": GLOBAL_BATCH,
        "data__shuffle": False,
        "data__validation": str(folder / "data"),
        "optimizer__learning_rate": 1e-2,
        "history__store": str(directory / "history") if changes.get("history__source") == "frozen" else None,
        "checkpoint__directory": str(directory) if "previous_visit" in changes.values() else None,
        "logging__directory": str(directory / "logs"),
        "logging__records_every": 1,
        "logging__watch": WATCHED,
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def train(rank, many):
    """Train with several settings, one after another: a checksum of weights and random states of each step, and its loss."""
    import torch
    from megatron.core import tensor_parallel

    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training import loop
    from tests.helpers.workbench import make_trainer

    original, found = loop.training_step, []

    def training_step(trainer, number):
        states = [torch.get_rng_state(), *tensor_parallel.get_cuda_rng_tracker().get_states().values()]
        metrics, norm, reports = original(trainer, number)
        gradients = [buffer.grad_data for chunk in trainer.model.chunks for buffer in chunk.buffers]
        weights = [weight.data for chunk in trainer.model.chunks for weight in chunk.parameters()]
        digest = hashlib.sha256()
        for tensor in (*states, *gradients, *weights):
            digest.update(tensor.contiguous().numpy().tobytes())
        found[-1].append((digest.hexdigest(), metrics.loss_selected, norm))
        return metrics, norm, reports

    loop.training_step = training_step
    for settings in many:
        found.append([])
        loop.train(make_trainer(settings))
        reset_layout()
    return found


@pytest.fixture(scope="module", params=CASES)
def runs(request, folder, tmp_path_factory):
    """Of some sources: the same run with watched samples and validation before the first step, and without; what both did."""
    place, (layout, sources) = tmp_path_factory.mktemp("runs"), request.param
    many = []
    for name in sources:
        for end, alone in (("", {}), ("-alone", {"logging__watch": 0, "training__validate_first": False})):
            many.append(settings_in(folder, place / f"{name}{end}", **(SOURCES[name] | layout | alone)))
    return place, sources, run_distributed(train, 2, many)


def test_training_never_notices(runs):
    """Gradients, weights and random states of every step are the same, bit for bit."""
    for found in runs[2]:
        for watched, alone in zip(found[::2], found[1::2], strict=True):
            assert len(watched) == 2 * EPOCH and watched == alone


OF_HISTORY = ("history_loss", "rel_norm", "score", "selected", "weight")


def responses(rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.flatnonzero((rows["role"] == 1) & (rows["position"] > 0))


def rows_of(path, samples) -> dict[str, np.ndarray]:
    records = read_records(path)
    here = np.isin(records["sample"], samples)
    return {name: values[here] for name, values in records.items() if name != "text"}


def test_what_they_tell_is_what_steps_see(runs):
    """The first step has the weights of the start, and the first of the second epoch those of the end of the first."""
    place, sources, _ = runs
    for name in sources:
        logs = place / name / "logs"
        assert sorted(path.name for path in (logs / "watched").iterdir()) == [
            f"step_{step:07d}.parquet" for step in range(2 * EPOCH + 1)
        ]
        for step in (0, EPOCH):
            watched = rows_of(logs / "watched" / f"step_{step:07d}.parquet", range(NUM_SAMPLES))
            assert sorted({*watched["sample"].tolist()}) == [*range(WATCHED)]
            seen = rows_of(logs / "records" / f"step_{step + 1:07d}.parquet", range(WATCHED))
            if name == "previous_visit" and step == EPOCH:  # the next epoch has not begun
                assert np.isnan(watched["history_loss"]).all() and watched["selected"].sum() == len(responses(watched))
                seen = {column: values for column, values in seen.items() if column not in OF_HISTORY}
            if name == "dropout":
                seen = {column: seen[column] for column in ("sample", "position", "token", "role", "history_loss")}
            for column, values in seen.items():
                np.testing.assert_allclose(
                    watched[column], values, rtol=0, atol=1e-4, err_msg=f"{name} {step} {column}"
                )


def test_history_of_the_visit_before(runs):
    """Within an epoch it is what the samples were compared with at their visit."""
    place, sources, _ = runs
    if "previous_visit" not in sources:
        pytest.skip("a run of another source")
    logs = place / "previous_visit" / "logs"
    seen = rows_of(logs / "records" / f"step_{EPOCH + 1:07d}.parquet", range(WATCHED))
    for step in (EPOCH + 1, 2 * EPOCH):
        watched = rows_of(logs / "watched" / f"step_{step:07d}.parquet", range(WATCHED))
        np.testing.assert_array_equal(watched["history_loss"], seen["history_loss"])
        assert not np.isnan(watched["history_loss"][responses(watched)]).any()


def test_histories_are_of_their_weights(runs):
    """At the end: of fixed weights as at the start, of moving ones no longer."""
    place, sources, _ = runs
    for name in {*sources} - {"previous_visit"}:
        watched = place / name / "logs" / "watched"
        first, last = (rows_of(watched / f"step_{step:07d}.parquet", range(WATCHED)) for step in (0, 2 * EPOCH))
        assert not np.array_equal(first["loss"], last["loss"], equal_nan=True)
        stays = np.allclose(first["history_loss"], last["history_loss"], rtol=0, atol=1e-5, equal_nan=True)
        assert stays == (name not in ("snapshot", "ema"))


@pytest.mark.parametrize("watch", [0, 1, 5, NUM_SAMPLES, 40])
def test_the_first_samples_of_the_order_are_watched(folder, tmp_path, watch):
    from megatron_sstoken.validate.run import plan_run

    settings = settings_in(folder, tmp_path, data__shuffle=True, logging__watch=watch, selection__method="attention")
    plan = plan_run(settings, 1)
    found = watched_samples(plan)
    order = [index for number in range(NUM_SAMPLES) for index in plan.train.order.pack(number).tolist()]
    assert found.tolist() == sorted(order[:watch])
