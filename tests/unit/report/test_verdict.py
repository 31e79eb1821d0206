"""The three answers come first, follow from the figures, tell them, and say what is missing."""

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
            "Selection does not help here (0.017 nats above “full”): validation loss is 1.204 after 40 steps (2.5 before "
            "training); “full” has 1.187. Each is a single run of 40 steps: another seed may turn the order round.",
        ),
        (MAIN, [run("all", "full", [(40, 1.3)])], "Selection helps here (0.096 nats below “all”): validation loss is"),
        (MAIN, [run("full", "full", [(40, 1.2)])], "No difference that one seed could show (0.004 nats above “full”): "),
        (
            MAIN,
            [run("full", "full", [(20, 1.4)])],
            "Selection does not help here (0.1 nats above “full”): validation loss is 1.204 after 40 steps (2.5 before "
            "training); “full” has 1.4 after 20 steps (this run: 1.5). ",
        ),
        (
            MAIN,
            [run("full", "full", [(0, 2.5), (60, 0.9)])],
            "“full” has 0.9 after 60 steps and was not validated at a step of this run: it cannot be compared with.",
        ),
        (MAIN, [run("full", "full", [(40, 1.1), (60, 1.0)])], "“full” has 1.1. "),
        (
            MAIN,
            [run("full", "full", [(40, 1.1)]), run("random", "random", [(40, 1.15)])],
            "and as many tokens drawn at random do better (this run is 0.054 nats above “random”): ",
        ),
        (
            MAIN,
            [run("full", "full", [(40, 1.1)]), run("random", "random", [(40, 1.2)])],
            "and as many tokens drawn at random do as well (this run is 0.004 nats above “random”): ",
        ),
        (
            MAIN,
            [run("full", "full", [(40, 1.3)]), run("random", "random", [(40, 1.25)])],
            "and as many tokens drawn at random do worse (this run is 0.046 nats below “random”): ",
        ),
        (MAIN, [run("random", "random", [(40, 1.3)])], "; a run of method “full” would say whether selection helps: v"),
        (MAIN, [], "cannot be said: no run to compare with was given (--compare). Validation loss is 1.204 after 40 steps"),
        (MAIN, [run("full", "full")], "“full” has no validation loss to compare with."),
        (run(), [], "the run has no validation loss (data.validation)"),
        (run(method="full", validation=[(40, 1.0)]), [MAIN], "This run trains on every token"),
        (
            run(validation=[(40, 1.0)], data={"validation_fingerprint": "a"}),
            [run("full", "full", [(40, 0.5)], data={"validation_fingerprint": "b"})],
            "“full” was validated on other data: it cannot be compared with.",
        ),
    ],
)  # fmt: skip
def test_whether_selection_helps(main, compared, says):
    assert says in helps(main, compared)


def test_what_a_single_run_can_show_is_told():
    rival = run("full", "full", [(40, 1.0)])
    caution = "Each is a single run of 40 steps, validated on 1,319 samples: another seed may turn the order round."
    assert helps(MAIN, [rival], 1319).endswith(caution)
    assert "single run" not in helps(MAIN, [], 1319)


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
    said = dropping(run(), {20: step}, step, kinds, {0: " the", 1: "\u202e\n", 2: "x"})
    assert said == (
        "17.5% of the response tokens recorded at step 20 are dropped; clearly more often: '\\u202e\\n' (75% of 40). "
        "Dropped tokens have a mean loss of 2 nats, kept ones 1."
    )


def test_frequent_kinds_are_named_only_if_they_are_dropped_clearly_more_often_than_others():
    """Not by how many of them are dropped, nor where chance may explain it, nor where there are few."""
    step, kinds = sums({0: (3000, 2000), 1: (60, 140), 2: (55, 45), 3: (1, 18), 4: (190, 110)})
    said = dropping(run(), {20: step}, step, kinds, {0: "often", 1: "clear", 2: "chance", 3: "few", 4: "less"})
    assert "clearly more often: 'clear' (70% of 200). " in said
    step, kinds = sums({0: (300, 200), 1: (60, 40)})
    said = dropping(run(), {5: step, 10: step}, step, kinds, {0: "a", 1: "b"})
    assert "recorded at steps 5 and 10 are dropped; no kind of token clearly more often than others." in said
    step, kinds = sums({0: (0, 50), 1: (0, 50)})
    assert "100% of the response tokens recorded are dropped; no kind" in dropping(
        run(), {0: step}, step, kinds, {0: "a"}
    )


def test_losses_of_the_dropped_are_those_that_the_charts_show():
    step, kinds = sums({0: (95, 5)})
    main = run()
    main.curves |= {"loss/dropped": [(10, 3.0), (20, 0.91972)], "loss/selected": [(10, 3.0), (20, 1.161)]}
    said = dropping(main, {10: step, 20: step}, step, kinds, {0: "a"})
    assert said.endswith("At step 20 dropped tokens have a mean loss of 0.9197 nats, kept ones 1.161.")
    many = dropping(main, dict.fromkeys(range(10, 80, 10), step), step, kinds, {0: "a"})
    assert "recorded at 7 steps from 10 to 70 are dropped" in many


def test_a_run_that_selects_nothing_drops_nothing():
    full = run(method="full", drift=[(10, 1.0)])
    assert "method “full” trains on every response token" in dropping(full, {}, StepFigures(), KindFigures(), {})
    assert drifting(full, {}) == "No token is dropped, so none can drift."


def test_the_group_that_is_dropped_most_comes_before_single_tokens():
    total, kinds = sums({7: (60, 140), 8: (540, 260)})
    steps = {20: total}
    groups = [{"name": "digits", "count": 300, "dropped": 200}, {"name": "words", "count": 700, "dropped": 200}]
    said = dropping(run(), steps, total, kinds, {7: "clear"}, groups)
    assert "are dropped; clearly more often digits (66.7%, 200 of the 400 dropped), of single tokens 'clear'" in said
    even = [{"name": "digits", "count": 300, "dropped": 120}, {"name": "words", "count": 700, "dropped": 280}]
    assert "clearly more often: 'clear'" in dropping(run(), steps, total, kinds, {7: "clear"}, even)


def test_nothing_to_say_of_what_is_dropped():
    assert "Nothing is dropped: all 7" in dropping(run(), {}, *sums({0: (7, 0)}), {0: "a"})
    nothing = dropping(run(), {}, StepFigures(), KindFigures(), {})
    assert nothing == "What is dropped cannot be said: there are no token records (logging.records_every)."
    main = run()
    main.curves["selection/share"] = [(3, 0.75)]
    assert "; 25% were dropped at step 3." in dropping(main, {}, StepFigures(), KindFigures(), {})


@pytest.mark.parametrize(
    ("curve", "settings", "says"),
    [
        (
            [(5, 0.1), (10, 0.15), (15, 0.25), (20, 0.31)], {},
            "Drifting: dropped tokens are 0.31 nats above their history losses at step 20, their highest so far, and above the "
            "bound of 0.2 (selection.drift_bound) since step 15.",
        ),
        ([(10, 0.5), (15, 0.1), (20, 0.3)], {}, "Drifted, and coming back: dropped tokens are 0.3 nats above their "
         "history losses at step 20, after a peak of 0.5 at step 10, and above the bound of 0.2 (selection.drift_bound) since "
         "step 20."),
        ([(10, 0.32), (20, 0.31)], {}, "Drifting: dropped tokens are 0.31 nats above their history losses at step 20, after a "
         "peak of 0.32 at step 10, and above the bound of 0.2 (selection.drift_bound) since step 10."),
        (
            [(2, 0.0), (3, 0.01), (10, 0.0771), (15, 0.137), (20, 0.114)], {},
            "Not beyond the bound of 0.2 (selection.drift_bound): dropped tokens are 0.114 nats above their history losses at "
            "step 20, after a peak of 0.137 at step 15, and above 0 since step 3.",
        ),
        ([(10, 0.05), (20, 0.15)], {}, "Not beyond the bound of 0.2 (selection.drift_bound) so far, but rising: dropped "
         "tokens are 0.15 nats above their history losses at step 20, their highest so far, and above 0 since step 10."),
        ([(10, 0.15), (20, 0.15)], {}, "Not beyond the bound of 0.2 (selection.drift_bound): dropped"),
        ([(10, 0.3), (20, 0.1)], {}, "Drifted, and came back within the bound of 0.2 (selection.drift_bound): dropped"),
        ([(10, -0.1), (20, -0.2)], {}, "No drift: dropped tokens are 0.2 nats below their history losses at step 20."),
        ([(10, 0.1), (20, -0.2)], {}, "No drift: dropped tokens are 0.2 nats below their history losses at step 20, after "
         "a peak of 0.1 at step 10."),
        ([(20, 0.3)], {"selection": {"drift_bound": 0.5}}, "Not beyond the bound of 0.5"),
        ([(20, 0.3)], {}, "Drifting: dropped tokens are 0.3 nats above their history losses at step 20, above the bound of 0.2 "
         "(selection.drift_bound)."),
        ([(20, 0.3)], {"history": {"hf_path": "b"}, "model": {"hf_path": "a"}}, "The history is another model's (b), so"),
        ([(20, 0.3)], {"history": {"hf_path": "a"}, "model": {"hf_path": "a"}}, "Drifting:"),
        ([], {}, "cannot be said: there are no history losses"),
    ],
)  # fmt: skip
def test_whether_anything_drifts(curve, settings, says):
    main = run(drift=curve)
    main.settings |= settings
    logged = says.replace("losses at step 20", "losses at step 20 (a running mean)")
    assert logged in drifting(main, {})


def test_a_mean_over_steps_and_the_last_step_are_told_apart():
    records = {20: StepFigures(num_dropped=2, change_dropped=0.5, num_changed=2)}
    main = run(drift=[(10, 0.1), (20, 0.15)])
    assert (
        "0.15 nats above their history losses at step 20 (a running mean; 0.25 in the records of that step)"
        in drifting(main, records)
    )


def test_a_run_too_short_for_its_own_warning_says_so():
    short = "Too short a run for its own warning, which takes 20 steps above the bound (selection.drift_steps)."
    settings = {"method": "sstoken", "drift_steps": 20}
    assert drifting(run(drift=[(20, 0.1)], selection=settings), {}).endswith(short)
    assert short not in drifting(run(drift=[(21, 0.1)], selection=settings), {})


def test_without_a_curve_the_records_tell():
    early = StepFigures(num_dropped=2, change_dropped=0.2, num_changed=2)
    late = StepFigures(num_dropped=2, change_dropped=1.0, num_changed=2)
    said = drifting(run(), {20: late, 10: early})
    assert "0.5 nats above their history losses at step 20, their highest so far, and above the bound" in said
    assert drifting(run(), {1: StepFigures(num_selected=3)}) == "No token is dropped, so none can drift."
