"""The monitor of drift: its mean against float64, when it speaks, and what it leaves in a checkpoint."""

import json
import math

import numpy as np
import pytest

from megatron_sstoken.config import SelectionSettings
from megatron_sstoken.training.drift import DECAY, DriftMonitor


def monitor(**changes) -> DriftMonitor:
    return DriftMonitor(SelectionSettings(**({"drift_bound": 0.1, "drift_steps": 3} | changes)))


def test_the_mean_weighs_steps_by_their_age():
    values = np.random.default_rng(0).normal(0.3, 1.0, 40)
    drift = monitor()
    assert math.isnan(drift.value)
    for number, value in enumerate(values):
        drift.observe(float(value))
        weights = DECAY ** np.arange(number, -1, -1, dtype=np.float64)
        assert drift.value == pytest.approx((weights * values[: number + 1]).sum() / weights.sum(), rel=1e-12)


def test_steps_without_a_finite_number_do_not_count():
    drift, other = monitor(), monitor()
    for value in (0.2, math.nan, math.inf, -math.inf, 0.4):
        drift.observe(value)
    for value in (0.2, 0.4):
        other.observe(value)
    assert drift.value == other.value and drift.state_dict() == other.state_dict()


def test_it_is_due_after_so_many_steps_in_a_row_above_the_bound():
    drift, due = monitor(), []
    for value in (1.0, 1.0, -20.0, 30.0, 1.0, 1.0, 1.0):
        drift.observe(value)
        due.append(drift.is_due)
    assert due == [False] * 5 + [True] * 2, "the mean falls below the bound once, which begins the count again"
    at_the_bound = monitor()
    for _ in range(9):
        at_the_bound.observe(0.1 - 1e-9)
    assert not at_the_bound.is_due


def until_silent(drift: DriftMonitor, num_steps: int = 40) -> list[int]:
    """The steps after which it speaks, of as many that are far above the bound."""
    spoken = []
    for step in range(1, num_steps + 1):
        drift.observe(2.0)
        if drift.is_due:
            assert "2.00 nats" in drift.act()
            spoken.append(step)
    return spoken


def test_a_warning_and_exploration_come_once_and_rho_rises_to_one():
    assert until_silent(monitor()) == [3]
    assert until_silent(monitor(on_drift="explore")) == [3]
    assert until_silent(monitor(on_drift="raise_rho", rho=0.75)) == [3, 6, 9]


def test_the_distance_to_another_model_is_followed_and_is_no_drift():
    drift = DriftMonitor(SelectionSettings(drift_bound=0.1, drift_steps=3), own_history=False)
    assert until_silent(drift) == [] and drift.value == pytest.approx(2.0)


def test_what_it_says():
    drift = monitor()
    until_silent(drift, 2)
    drift.observe(2.0)
    assert drift.act() == (
        "selection drifts: the loss of dropped tokens has been above their history loss, by 2.00 nats in the mean (more than "
        "selection.drift_bound=0.1 for 3 steps), so they are not selected again: use a lower optimizer.learning_rate or a "
        "higher selection.rho, or let selection.on_drift=raise_rho or explore see to it (docs/selection.md)"
    )
    raising, exploring = monitor(on_drift="raise_rho", rho=0.6), monitor(on_drift="explore", explore=0.05)
    assert raising.act().endswith(": selection.rho is 0.7 from now on")
    assert exploring.act().endswith(": 0.05 of the selected tokens are drawn at random from now on")


def test_settings_after_drift():
    def after(times: int, **changes) -> tuple:
        found = SelectionSettings(**changes).after_drift(times)
        return found.rho, found.explore

    assert [after(times, on_drift="raise_rho", rho=0.7) for times in range(5)] == [
        (0.7, 0.0), (0.8, 0.0), (0.9, 0.0), (1.0, 0.0), (1.0, 0.0),
    ]  # fmt: skip
    assert [after(times, on_drift="explore", explore=0.3) for times in (0, 1, 2)] == [
        (0.6, 0.0),
        (0.6, 0.3),
        (0.6, 0.3),
    ]
    assert after(1, on_drift="explore") == (0.6, 0.1)
    assert [after(times, explore=0.2) for times in (0, 1)] == [(0.6, 0.2), (0.6, 0.2)]


def test_the_largest_share_is_what_memory_is_planned_for():
    assert SelectionSettings(rho=0.6).largest_rho == 0.6 and SelectionSettings(rho="auto").largest_rho == 0.9
    assert SelectionSettings(rho=0.6, on_drift="raise_rho").largest_rho == 1.0


def test_a_state_goes_on_where_it_was_through_json():
    values = np.random.default_rng(1).normal(0.2, 0.3, 30).tolist()
    whole = monitor()
    for number, value in enumerate(values):
        if number == 17:
            resumed = DriftMonitor(whole._settings, json.loads(json.dumps(whole.state_dict())))
        whole.observe(value)
        if whole.is_due:
            whole.act()
    for value in values[17:]:
        resumed.observe(value)
        if resumed.is_due:
            resumed.act()
    assert resumed.state_dict() == whole.state_dict() and resumed.value == whole.value
    assert monitor().state_dict() == {}
