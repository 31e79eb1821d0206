"""What is deleted in a checkpoint directory, and what is not."""

import json
import os
import time

import pytest

from megatron_sstoken.checkpoint.manifest import (
    PROBE,
    checkpoint_steps,
    set_aside,
    superfluous_steps,
    tidy,
    without_description,
)


def make_step(directory, name, *, files=("__0_0.distcp", ".metadata", "checksums.json"), diverged=None, described=True):
    folder = directory / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("x")
    if described:
        state = {"step": 1, "identity": None, "hf_path": "", "diverged": diverged}
        (folder / "sstoken.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, {1, 2, 3, 4, 5}), (1, {3, 5}), (2, {2, 3, 5}), (9, {1, 2, 3, 5})], ids=str
)
def test_a_diverged_checkpoint_takes_no_place_of_a_sound_one(tmp_path, keep, kept):
    for step in range(1, 6):
        make_step(tmp_path, f"step_{step:07d}", diverged="loss 1e5" if step > 3 else None)
    tidy(str(tmp_path), keep)
    assert set(checkpoint_steps(str(tmp_path))) == kept
    assert superfluous_steps(str(tmp_path), keep) == []


def test_what_killed_runs_leave_goes_and_what_others_put_there_stays(tmp_path):
    make_step(tmp_path, "step_0000004")
    make_step(tmp_path, "step_0000002", described=False)
    cut_short = (".metadata.tmp", "settings.yaml", "run.json.partial", "sstoken.json.partial", "checksums.json.partial")
    make_step(tmp_path, "step_0000006.partial", files=cut_short)
    make_step(tmp_path, "step_0000008.partial", files=("notes.txt",), described=False)
    aside = set_aside(make_step(tmp_path, "step_0000005"), "aside")
    again = set_aside(make_step(tmp_path, "step_0000005"), "aside")
    old, new = tmp_path / f"{PROBE}old", tmp_path / f"{PROBE}new"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 100,) * 2)
    tidy(str(tmp_path), 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_0000004", "step_0000008.partial", aside.name, again.name, new.name}
    assert (aside.name, again.name) == ("step_0000005.aside", "step_0000005.aside-2")


def test_a_folder_without_its_description_is_found(tmp_path):
    lost = make_step(tmp_path, "step_0000002", described=False)
    make_step(tmp_path, "step_0000003.partial", described=False)
    (tmp_path / "step_0000004").mkdir()
    assert without_description(str(tmp_path)) == [lost]
    assert without_description(str(tmp_path / "nowhere")) == []
