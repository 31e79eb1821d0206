"""One checkpoint at a time is written; what its step proves to be worth reaches it, written or not; none is left half done."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_sstoken.checkpoint.manifest import RunState
from megatron_sstoken.config import CheckpointSettings, SettingsError
from megatron_sstoken.training import saving
from megatron_sstoken.training.saving import Saver


class Unfinished:
    """Stands in for a checkpoint that is being written; notes what becomes of it."""

    def __init__(self, events, state):
        self.events, self.state, self.is_written = events, state, False
        events.append(("begun", state.step))

    def finish(self, keep):
        self.events.append(("finished", self.state.step, keep, self.state.diverged))
        return f"step_{self.state.step}"

    def abandon(self):
        self.events.append(("abandoned", self.state.step))


@pytest.fixture
def events(monkeypatch):
    events = []
    monkeypatch.setattr(saving, "begin_save", lambda directory, state, *rest: Unfinished(events, state))
    monkeypatch.setattr(saving, "tidy", lambda directory, keep: events.append(("tidied", keep)))
    monkeypatch.setattr(saving, "mark_diverged", lambda directory, step, why: events.append(("marked", step, why)))
    return events


def saver_of(rank=0, **changes):
    settings = CheckpointSettings(directory="somewhere", **changes)
    said = []
    return Saver(settings, SimpleNamespace(rank=rank), SimpleNamespace(say=said.append)), said


def begin(saver, step, *, final=False):
    history = SimpleNamespace(state_dict=dict, weights_copy=tuple)
    saver.begin(RunState(step, None, ""), None, None, None, history, final=final)


def test_a_second_save_waits_for_the_first(events):
    saver, said = saver_of()
    assert not saver.is_writing
    begin(saver, 2)
    assert saver.is_writing and saver.newest == 2
    begin(saver, 4, final=True)
    saver.finish()
    saver.finish()
    assert events == [("begun", 2), ("finished", 2, None, None), ("begun", 4), ("finished", 4, 2, None)]
    assert said == ["saved step_2", "saved step_4"] and not saver.is_writing


@pytest.mark.parametrize("finished", [True, False], ids=["on disk", "being written"])
@pytest.mark.parametrize("diverged", [None, "the loss was 1e9"])
def test_the_next_step_tells_what_a_checkpoint_is_worth(events, finished, diverged):
    saver, _ = saver_of(keep=3)
    begin(saver, 2)
    if finished:
        saver.finish()
    saver.judge(1, "of another step")
    saver.judge(2, diverged)
    saver.finish()
    if not finished:  # older ones go only now, and only for a sound one
        assert events[1:] == [("finished", 2, 3 if diverged is None else None, diverged)]
    else:
        assert events[1:] == [
            ("finished", 2, None, None),
            ("tidied", 3) if diverged is None else ("marked", 2, diverged),
        ]


def test_the_first_process_alone_deletes_and_marks(events):
    saver, _ = saver_of(rank=1)
    begin(saver, 2)
    saver.finish()
    saver.judge(2, None)
    saver.judge(2, "the loss was 1e9")
    assert events == [("begun", 2), ("finished", 2, None, None)]


def test_what_was_known_to_be_diverged_stays_so(events):
    saver, _ = saver_of()
    begin(saver, 2)
    saver._unfinished.state = replace(saver._unfinished.state, diverged="before")
    saver.judge(2, None)
    assert saver._unfinished.state.diverged == "before"


@pytest.mark.parametrize("error", [None, FloatingPointError("NaN"), SettingsError(["damaged"])], ids=repr)
def test_an_end_that_all_processes_know_of_leaves_a_whole_checkpoint(events, error):
    saver, _ = saver_of()
    begin(saver, 2)
    try:
        with saver:
            if error is not None:
                raise error
    except (FloatingPointError, SettingsError) as raised:
        assert raised is error
    assert events[-1][:2] == ("finished", 2)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
def test_nobody_waits_where_one_process_fails_alone(events, error):
    saver, _ = saver_of()
    begin(saver, 2)
    with pytest.raises(type(error)), saver:
        raise error
    assert events[-1] == ("abandoned", 2)


def test_minutes_are_those_of_the_first_process(events, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    (first, _), (second, _), (never, _) = saver_of(save_minutes=2), saver_of(1, save_minutes=2), saver_of()
    for passed, due in ((119, False), (120, True)):
        now[0] = 100 + passed
        assert (first.minutes_are_over, second.minutes_are_over, never.minutes_are_over) == (due, False, False)
    begin(first, 2)
    assert not first.minutes_are_over
