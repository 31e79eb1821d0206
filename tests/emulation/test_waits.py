"""How often the host waits for the device in a training step, on the CUDA path of the torch backend, emulated.

A wait costs little where the device is behind and all of its idle time where it is not: none a micro-batch, one a step.
"""

from collections import Counter
from typing import Any

import pytest

from tests.emulation.running import run_pretended
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer

NORM = "item _local_scalar_dense at megatron/core/optimizer/clip_grads.py"
"""The gradient norm: the one wait of a step."""
NORM_WITHOUT_KERNELS = "to device torch.tensor (1,) at megatron/core/utils.py"
"""A flag that megatron makes for the norm where neither Transformer Engine nor apex brings a kernel for it."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    model, history = (make_model(folder / str(seed), seed=seed) for seed in range(2))
    return model, history, make_store(folder / "data", make_samples(40, longest=60))


def second_steps(rank, settings) -> list[tuple[Counter[str], dict[str, int], int, float]]:
    """On each rank, of the second step of each: waits by place, mixed devices, number of micro-batches, loss."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import training_step
    from tests.emulation.pretended_device import recording

    found = []
    for one in settings:
        trainer = make_trainer(one)
        training_step(trainer, 0)
        with recording() as recorded:
            metrics, _, _ = training_step(trainer, 1)
        waits = Counter(str(wait) for wait in recorded.waits)
        found.append((waits, dict(recorded.mixed), trainer.plan.shape.num_micro_batches, metrics.loss_selected))
        reset_layout()
    return found


def settings_of(paths, **changes: Any):
    model, history, data = paths
    base = {
        "data__packing": True,
        "data__sequence_length": 64,
        "training__precision": "bf16",
        "training__micro_batch_size": 2,
        "history__hf_path": history,
    }
    return make_settings(model, data, **(base | changes))


def unexpected(waits: Counter[str], allowed: dict[str, int]) -> dict[str, int]:
    """Waits at other places than those whose beginnings are allowed, or more often than allowed."""
    left = dict(waits)
    for beginning, number in allowed.items():
        for place in [place for place in left if place.startswith(beginning)]:
            left[place] -= number
    return {place: number for place, number in left.items() if number > 0}


STEP = {NORM: 1, NORM_WITHOUT_KERNELS: 1}


def test_one_process_waits_once_a_step(paths):
    """Plain fine-tuning, ssToken, and a first-layer capture: no wait for any micro-batch."""
    cases = {
        "full": {"selection__method": "full"},
        "sstoken": {},
        "exploring": {"selection__explore": 0.2},
        "random by sample average": {"selection__method": "random", "selection__loss_average": "sample"},
        "entropy and context": {"logging__context_loss": True},
        "soft weights": {"weights__method": "entropy", "weights__divisor": "weight"},
        "threshold": {
            "selection__method": "probability",
            "selection__rule": "threshold",
            "selection__threshold": 0.01,
            "selection__scope": "batch",
        },
        "all data": {"selection__method": "history_probability", "selection__scope": "dataset"},
        "a history that moves": {"history__hf_path": None, "history__source": "ema"},
    }
    (results,) = run_pretended(second_steps, 1, [settings_of(paths, **changes) for changes in cases.values()])
    for name, (waits, mixed, num_micro_batches, _) in zip(cases, results, strict=True):
        assert num_micro_batches > 1
        assert (unexpected(waits, STEP), mixed) == ({}, {}), name


def test_scopes_that_compare_samples_wait_for_what_they_must_know(paths):
    """`microbatch`: the threshold, and how many of its tokens are this rank's. `batch`: the same and the masks, once a step."""
    cases = {"microbatch": {"selection__scope": "microbatch"}, "batch": {"selection__scope": "batch"}}
    (results,) = run_pretended(second_steps, 1, [settings_of(paths, **changes) for changes in cases.values()])
    for (scope, (waits, mixed, num_micro_batches, _)), number in zip(
        zip(cases, results, strict=True), (results[0][2], 1), strict=True
    ):
        allowed = STEP | {"to host tolist": 2 * number, "size nonzero": num_micro_batches, "to host copy": 1}
        assert (unexpected(waits, allowed), mixed) == ({}, {}), scope


@pytest.mark.parametrize(
    ("layout", "per_micro_batch"),
    [
        ({"parallel__pipeline": 2}, 0),
        ({"parallel__pipeline": 2, "selection__layer": [0, -1]}, 0),
        ({"parallel__tensor": 2, "parallel__sequence": True, "weights__method": "entropy"}, 0),
        ({"parallel__context": 2}, 1),  # which of the selected tokens lie here
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value),
)
def test_layouts_wait_no_more(paths, layout, per_micro_batch):
    for ((waits, mixed, num_micro_batches, _),) in run_pretended(second_steps, 2, [settings_of(paths, **layout)]):
        allowed = STEP | {"size nonzero": per_micro_batch * num_micro_batches}
        assert (unexpected(waits, allowed), mixed) == ({}, {})
