"""Checkpoints move between the supported lines of megatron-core: each line's is resumed and exported by the installed one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_sstoken.supported import LINES
from tests.helpers.lines import CHECKPOINTS, SAVED, STEPS, export, run_settings, train

FOLDERS = [CHECKPOINTS / f"megatron-core-{line.megatron_core}" for line in LINES]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request, tmp_path):
    """A copy of what one line made, in another place."""
    return shutil.copytree(request.param, tmp_path / "copy")


@pytest.mark.parametrize(("num_ranks", "tensor"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_run_goes_on(folder, num_ranks, tensor):
    whole = {int(step): loss for step, loss in json.loads((folder / "losses.json").read_text()).items()}
    losses = train(run_settings(folder, folder / "run", parallel__tensor=tensor), num_ranks)
    assert list(losses) == list(range(SAVED + 1, STEPS + 1)), "it goes on after the saved step"
    for step, loss in losses.items():
        assert loss == pytest.approx(whole[step], abs=2e-6 if num_ranks == 1 else 1e-5), step


def test_the_export_is_the_same_bit_for_bit(folder, tmp_path):
    found, expected = export(folder, tmp_path / "exported"), load_file(folder / "exported.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
