"""Exploration draws the same tokens on every layout; what is done about drift is the same on all ranks, and resumes."""

import pytest

from tests.helpers import cli, programs
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

LAYOUTS = {"dp2": {}, "cp2": {"parallel__context": 2}, "pp2": {"parallel__pipeline": 2}}
SCOPES = ("sample", "batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, another one as history, and data."""
    folder = tmp_path_factory.mktemp("drift")
    make_model(folder / "model", seed=1)
    make_model(folder / "history", seed=2)
    make_store(folder / "data", make_samples(24, seed=4))
    return folder


def settings_in(folder, **changes):
    return make_settings(
        str(folder / "model"),
        str(folder / "data"),
        **({"history__hf_path": str(folder / "history"), "data__packing": True, "data__shuffle": True} | changes),
    )


def exploring(folder, share: float, **changes):
    return [
        settings_in(folder, selection__method="attention", selection__explore=share, selection__scope=scope, **changes)
        for scope in SCOPES
    ]


def test_exploration_is_the_same_on_every_layout(folder):
    both = exploring(folder, 0.3) + exploring(folder, 0.0)
    single = run_distributed(run_cases, 1, both)[0]
    wanted, unexplored = single[: len(SCOPES)], single[len(SCOPES) :]
    for (_, columns, _), (_, before, _) in zip(wanted, unexplored, strict=True):
        assert columns["selected"].sum() == before["selected"].sum()
        new = int((columns["selected"] & ~before["selected"]).sum())
        assert 0 < new <= 0.3 * before["selected"].sum()
    cases = [(layout, one) for layout, parallel in LAYOUTS.items() for one in exploring(folder, 0.3, **parallel)]
    results = run_distributed(run_cases, 2, [one for _, one in cases])[0]
    for (layout, one), (loss, columns, gradients), (wanted_loss, before, wanted_gradients) in zip(
        cases, results, wanted * len(LAYOUTS), strict=True
    ):
        assert (columns["selected"] == before["selected"]).all(), (layout, one.selection.scope)
        assert loss == pytest.approx(wanted_loss, abs=1e-5), (layout, one.selection.scope)
        assert largest_difference(gradients, wanted_gradients) < 1e-4, (layout, one.selection.scope)


def train(num_ranks: int, settings, *more: str) -> str:
    result = programs.run("megatron_sstoken.train", [*cli.settings_arguments(settings), *more], num_ranks)
    assert result.returncode == 0, result.stderr
    return result.stdout


DRIFTING = {
    "history__hf_path": None,
    "selection__drift_bound": 0.0,
    "selection__drift_steps": 2,
    "training__micro_batch_size": 2,
    "optimizer__learning_rate": 1e-2,
}
"""Words are drawn at random, so that nothing learnt helps with the tokens that are dropped: from the second step on they are
worse than at the start."""


@pytest.mark.slow
def test_rho_is_raised_on_all_ranks_and_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path):
    settings = settings_in(
        folder, selection__on_drift="raise_rho", selection__rho=0.65, training__steps=8, checkpoint__directory=str(tmp_path),
        checkpoint__save_every=4, checkpoint__keep=0, parallel__pipeline=2, **DRIFTING,
    )  # fmt: skip
    names = ("selection/rho", "loss/dropped_minus_history", "loss/selected", "selection/share")
    output = train(2, settings, f"--logging.directory={tmp_path}/whole")
    assert "warning: step 3: selection drifts" in output and "selection.rho is 0.75 from now on" in output
    whole = {name: cli.scalars(tmp_path / "whole", name) for name in names}
    assert list(whole["selection/rho"].values()) == pytest.approx([0.65] * 3 + [0.75] * 2 + [0.85] * 2 + [0.95])
    for step, rho in whole["selection/rho"].items():
        assert rho <= whole["selection/share"][step] < rho + 0.1, "each sample's share is rounded up"
    # The checkpoint of step 4 is of a run that had drifted once, and was above the bound for one step more.
    assert "resumed from" in train(2, settings, f"--logging.directory={tmp_path}/rest", "--checkpoint.resume=4")
    for name in names:
        rest = cli.scalars(tmp_path / "rest", name)
        assert rest == {step: value for step, value in whole[name].items() if step > 4}, name


def test_exploration_begins_when_drift_is_noticed(folder, tmp_path):
    settings = settings_in(
        folder, selection__on_drift="explore", selection__explore=0.25, training__steps=5,
        logging__directory=str(tmp_path), **DRIFTING,
    )  # fmt: skip
    output = train(1, settings)
    assert output.count("selection drifts") == 1 and "warning: step 3: selection drifts" in output
    assert list(cli.scalars(tmp_path, "selection/explore").values()) == [0.0, 0.0, 0.0, 0.25, 0.25]
