"""The parts of the evidence benchmark that a wrong figure could come from."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evidence.__main__ import all_tasks
from benchmarks.evidence.arms import ARMS, NOISIEST, REFERENCE, Task
from benchmarks.evidence.faults import FAULTS, another_answer, boilerplate, random_words, with_faults, wrong_digits
from benchmarks.evidence.figures import Figure, Figures
from benchmarks.evidence.recovery import auc
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.sanity import require_equal_twins, twin_of
from benchmarks.evidence.scale import SCALES
from benchmarks.intervals import Interval

ANSWER = "Tom has 12 + 3 = <<12+3=15>>15 apples and gives 5 away.\nSo he has 15 - 5 = <<15-5=10>>10.\n#### 10"
OTHERS = ["Anna ate 2 pears, which leaves <<7-2=5>>5.\n#### 5", "The rabbit runs 9 miles.\n#### 9"]


def without(text: str, spans) -> str:
    """The text without the spans."""
    kept, done = [], 0
    for start, stop in spans:
        kept.append(text[done:start])
        done = stop
    return "".join([*kept, text[done:]])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_what_is_not_named_as_noise_is_the_answer_as_it_was(fault, seed):
    found = fault(ANSWER, OTHERS, random.Random(seed))
    assert found.noise and all(0 <= start < stop <= len(found.text) for start, stop in found.noise)
    assert all(before[1] <= after[0] for before, after in zip(found.noise, found.noise[1:], strict=False))
    if fault is wrong_digits:
        assert len(found.noise) == 5  # of 10 digits inside calculations
        assert all(found.text[a] != ANSWER[a] and found.text[a].isdigit() for a, _ in found.noise)
        assert without(found.text, found.noise) == without(ANSWER, found.noise)
    elif fault is random_words:
        foreign = {word for text in OTHERS for word in text.split()}
        assert {found.text[a:b] for a, b in found.noise} <= {word.strip(",.") for word in foreign} | {"banana"}
        assert found.text.split("=")[1:2] == ANSWER.split("=")[1:2]  # no digit is touched
    elif fault is boilerplate:
        assert without(found.text, found.noise) == ANSWER
    else:
        assert fault is another_answer and found.text in OTHERS and found.noise == ((0, len(found.text)),)


def test_as_many_answers_as_asked_for_have_a_fault():
    answers = [f"{number} = <<{number}={number}>>{number} of something\n#### {number}" for number in range(40)]
    found = with_faults(answers, 0.2, seed=3)
    kinds = [one.kind for one in found]
    assert len(found) == 40 and kinds.count("clean") == 32
    assert {kind: kinds.count(kind) for kind in set(kinds) - {"clean"}} == {
        "digits": 2, "words": 2, "boilerplate": 2, "another": 2
    }  # fmt: skip
    assert with_faults(answers, 0.2, seed=3) == found != with_faults(answers, 0.2, seed=4)
    assert all(one.text == answer for one, answer in zip(found, answers, strict=True) if one.kind == "clean")


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(np.array),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(np.array),
)
def test_area_is_the_share_of_pairs_in_order(positives, negatives):
    pairs = [float(p > n) + 0.5 * float(p == n) for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))


def test_differences_are_paired_by_seed():
    def rows(arm, values):
        return [Figure(0.2, "chosen", arm, seed, "clean all", value) for seed, value in values.items()]

    figures = Figures([*rows("full", {0: 1.0, 1: 2.0, 2: 3.0}), *rows("sstoken", {0: 1.1, 1: 2.1, 2: 3.3, 3: 9.0})])
    found = figures.difference(0.2, "chosen", "sstoken", "full", "clean all")
    # differences 0.1, 0.1, 0.3: standard deviation 0.11547, Student's t 4.303 for two degrees of freedom
    assert found.seeds == 3 and found.mean == pytest.approx(1 / 6)
    assert found.half == pytest.approx(4.303 * 0.11547 / math.sqrt(3), rel=1e-3)
    assert math.isnan(Interval.of([1.0]).half) and Interval.of([]).seeds == 0


def test_figures_survive_their_file(tmp_path):
    figures = Figures([Figure(0.1, "large", "full", 2, "clean all", 1.25)])
    figures.to_csv(tmp_path / "figures.csv")
    assert Figures.from_csv(tmp_path / "figures.csv").rows == figures.rows


def runs_in(work, device="cpu"):
    return Runs(work, work, SCALES[device], device, "auto", 1, math.inf)


def test_a_folder_of_results_belongs_to_one_scale(tmp_path):
    runs_in(tmp_path)
    runs_in(tmp_path)
    with pytest.raises(ValueError, match="holds results of other sizes"):
        runs_in(tmp_path, "cuda")


def test_weights_of_twins_must_be_equal_once_both_are_there(tmp_path):
    runs, full = runs_in(tmp_path), Task(ARMS["full"], NOISIEST, 0, 1e-4, "chosen")

    def found(task, weights):
        (folder := tmp_path / "runs" / task.name).mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps({"weights": weights}))

    found(full, "a")
    require_equal_twins(runs, full)
    found(twin_of(full), "a")
    require_equal_twins(runs, full)
    found(twin_of(full), "b")
    with pytest.raises(RuntimeError, match="differ"):
        require_equal_twins(runs, full)


def test_tasks_are_named_by_what_they_do_and_full_is_the_first():
    tasks = all_tasks(1e-4, 3)
    assert tasks[0] == Task(ARMS["full"], NOISIEST, 0, 1e-4, "chosen")
    assert len({task.name for task in tasks}) == len(tasks)
    assert {task.name for task in all_tasks(3e-4, 3)}.isdisjoint(task.name for task in tasks if task.rate == "chosen")
    assert {(task.arm.name, task.noise, task.rate) for task in tasks if task.is_asked} == {
        (name, NOISIEST, "chosen") for name in ("full", "random", "sstoken")
    }


def test_what_a_run_needs_comes_before_it():
    def task(name):
        return Task(ARMS[name], 0.2, 1, 3e-5, "large")

    assert task("rho1").prerequisites == [Task(REFERENCE, 0.0, 1, 3e-5, "large")]
    assert task("full_matched").prerequisites == [task("power")]
    assert task("full").prerequisites == []
    assert all(other in ARMS for arm in ARMS.values() for other in arm.compared_with)
