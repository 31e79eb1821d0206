"""The three sentences follow from the figures, tell them, and say what is missing."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sstoken.report.figures import KindFigures, StepFigures
from megatron_sstoken.report.runs import Run
from megatron_sstoken.report.verdict import drifting, dropping, helps


def run(name="run", method="sstoken", validation=(), drift=(), data=None, **settings):
    curves = {"loss/validation": list(validation), "loss/dropped_minus_history": list(drift)}
    sections = {"selection": {"method": method}, **settings}
    folder = Path(name)
    return Run(name, folder, folder, sections, data or {}, curves={key: one for key, one in curves.items() if one})


MAIN = run(validation=[(0, 2.5), (20, 1.5), (40, 1.204)])


@pytest.mark.parametrize(
    ("main", "compared", "says"),
    [
        (
            MAIN,
            [run("full", "full", [(40, 1.187)])],
            "Validation loss is 1.204 after 40 steps (2.5 before training); “full” has 1.187: selection does not help here "
            "(0.017 nats above “full”).",
        ),
        (MAIN, [run("all", "full", [(40, 1.3)])], "“all” has 1.3: selection helps here (0.096 nats below “all”)."),
        (MAIN, [run("full", "full", [(40, 1.2)])], "no difference that one seed could show (0.004 nats above “full”)."),
        (
            MAIN,
            [run("full", "full", [(20, 1.4)])],
            "“full” has 1.4 after 20 steps (this run: 1.5): selection does not help here (0.1 nats above “full”).",
        ),
        (
            MAIN,
            [run("full", "full", [(0, 2.5), (60, 0.9)])],
            "“full” has 0.9 after 60 steps and was not validated at a step of this run: it cannot be compared with.",
        ),
        (MAIN, [run("full", "full", [(40, 1.1), (60, 1.0)])], "“full” has 1.1: "),
        (
            MAIN,
            [run("full", "full", [(40, 1.1)]), run("random", "random", [(40, 1.15)])],
            "and as many tokens drawn at random do no worse (0.054 nats above “random”).",
        ),
        (MAIN, [run("random", "random", [(40, 1.3)])], "a run of method “full” would say whether selection helps."),
        (MAIN, [], "cannot be said: no run to compare with was given (--compare)."),
        (MAIN, [run("full", "full")], "“full” has no validation loss to compare with."),
        (run(), [], "the run has no validation loss (data.validation)"),
        (run(method="full", validation=[(40, 1.0)]), [MAIN], "this run trains on every token"),
        (
            run(validation=[(40, 1.0)], data={"validation_fingerprint": "a"}),
            [run("full", "full", [(40, 0.5)], data={"validation_fingerprint": "b"})],
            "“full” was validated on other data: it cannot be compared with.",
        ),
    ],
)  # fmt: skip
def test_whether_selection_helps(main, compared, says):
    assert says in helps(main, compared)


@pytest.mark.parametrize(("step", "data"), [(40, "b"), (60, "a")])
def test_a_run_on_other_data_or_of_other_length_decides_nothing(step, data):
    main = run(validation=[(0, 2.0), (40, 1.0)], data={"validation_fingerprint": "a"})
    said = helps(main, [run("full", "full", [(0, 2.0), (step, 0.5)], data={"validation_fingerprint": data})])
    assert "helps here" not in said and "does not help" not in said


def sums(kinds):
    """Of kinds: id → (kept, dropped); a kept token has a loss of 1, a dropped one of 2 nats."""
    step, figures = StepFigures(), KindFigures()
    for token, (kept, left) in kinds.items():
        selected = np.arange(kept + left) < kept
        columns = {
            "token": np.full(kept + left, token),
            "role": np.ones(kept + left, dtype=np.int8),
            "loss": np.where(selected, 1.0, 2.0).astype(np.float32),
            "selected": selected,
            "score": np.full(kept + left, np.nan, dtype=np.float32),
            "history_loss": np.full(kept + left, 1.5, dtype=np.float32),
        }
        step.add(columns, None)
        figures.add(columns)
    return step, figures


def test_what_is_dropped():
    step, kinds = sums({0: (95, 5), 1: (10, 30), 2: (60, 0)})
    said = dropping(run(), step, kinds, {0: " the", 1: "\u202e\n", 2: "x"})
    assert said == (
        "17.5 % of the response tokens are dropped, at a mean loss of 2 nats (kept: 1), mostly '\\u202e\\n' (85.7 %), ' the' "
        "(14.3 %) of them; dropped more often than others: '\\u202e\\n' (75 % of 40)."
    )


def test_a_run_that_selects_nothing_drops_nothing():
    full = run(method="full", drift=[(10, 1.0)])
    assert "method “full” trains on every response token" in dropping(full, StepFigures(), KindFigures(), {})
    assert drifting(full, {}) == "No token is dropped, so none can drift."


def test_nothing_to_say_of_what_is_dropped():
    assert "Nothing is dropped: all 7" in dropping(run(), *sums({0: (7, 0)}), {0: "a"})
    nothing = dropping(run(), StepFigures(), KindFigures(), {})
    assert nothing == "What is dropped cannot be said: there are no token records (logging.records_every)."
    main = run()
    main.curves["selection/share"] = [(3, 0.75)]
    assert "; 25 % were dropped at step 3." in dropping(main, StepFigures(), KindFigures(), {})


@pytest.mark.parametrize(
    ("curve", "settings", "says"),
    [
        ([(10, 0.1), (20, 0.31)], {}, "above their history losses at step 20 (rising: 0.1 at step 10), more than 0.2"),
        ([(10, 0.1), (20, 0.31)], {}, "(selection.drift_bound): drifting."),
        ([(10, 0.5), (20, 0.3)], {}, "drifted, and coming back."),
        ([(10, 0.32), (20, 0.31)], {}, "(steady: 0.32 at step 10), more than 0.2 (selection.drift_bound): drifting."),
        ([(10, 0.05), (20, 0.15)], {}, "within the bound of 0.2 (selection.drift_bound): not drifting yet."),
        ([(10, 0.15), (20, 0.15)], {}, "(steady: 0.15 at step 10), within the bound of 0.2 (selection.drift_bound): not"),
        ([(10, -0.1), (20, -0.2)], {}, "0.2 nats below their history losses at step 20 (falling: -0.1 at step 10): not"),
        ([(20, 0.3)], {"selection": {"drift_bound": 0.5}}, "at step 20, within the bound of 0.5"),
        ([(20, 0.3)], {"history": {"hf_path": "b"}, "model": {"hf_path": "a"}}, "another model's (b), so the distance"),
        ([(20, 0.3)], {"history": {"hf_path": "a"}, "model": {"hf_path": "a"}}, "drifting."),
        ([], {}, "cannot be said: there are no history losses"),
    ],
)  # fmt: skip
def test_whether_anything_drifts(curve, settings, says):
    main = run(drift=curve)
    main.settings |= settings
    assert says in drifting(main, {})


def test_without_a_curve_the_records_tell():
    early = StepFigures(num_dropped=2, change_dropped=0.2, num_changed=2)
    late = StepFigures(num_dropped=2, change_dropped=1.0, num_changed=2)
    said = drifting(run(), {20: late, 10: early})
    assert "0.5 nats above their history losses at step 20 (rising: 0.1 at step 10)" in said
    assert drifting(run(), {1: StepFigures(num_selected=3)}) == "No token is dropped, so none can drift."
