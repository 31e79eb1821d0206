"""Every launcher with every configuration plans its run on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import SettingsError
from megatron_sstoken.model.presets import MODELS
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from tests.helpers import cli
from tools.make_config import make_config, make_stand_in_data

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's own
CONFIGS = cli.ROOT / "pretrain_scripts" / "configs"
ONE = [f"--parallel.{name}=1" for name in ("tensor", "pipeline", "virtual_pipeline", "context")]
NODES = {name: 2 for name in MODELS} | {"Llama-3.1-70B": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The real architectures without weights, and stand-in data."""
    folder = tmp_path_factory.mktemp("launchers")
    for name in MODELS:
        make_config(name, folder / name)
    make_stand_in_data(folder / "data")
    return folder


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    paths = [f"--model.hf_path={folder / name}", f"--data.train={folder / 'data'}"]
    return [*paths, f"--checkpoint.directory={folder / 'run'}", *more]


def plan(folder: Path, name: str, world_size: int, *more: str):
    config = ["--config", str(CONFIGS / f"{name}.yaml")]
    settings, _ = parse_settings([*config, *arguments(folder, name, *more)], program="test", description="")
    return plan_run(settings, world_size, dry_run=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_plans_on_one_gpu_a_node_and_many(folder, name):
    sizes = [(1, [*ONE, "--parallel.sequence=false"]), (8 * NODES[name], [])]
    sizes += [(8, [])] if name != "Llama-3.1-70B" else []
    for world_size, more in sizes:
        found = plan(folder, name, world_size, *more)
        assert found.world_size == world_size and found.num_steps > 0
        assert [note for note in found.notes if "has neither model.safetensors" in note] == list(found.notes)
    assert (CONFIGS / f"{name}.yaml").is_file() and "note" in describe(found)


def test_fp8_is_a_note_of_a_dry_run_and_an_error_of_a_run(folder):
    fp8 = ["--training.precision=fp8", "--training.fp8_recipe=blockwise"]
    found = plan(folder, "Llama-3.1-8B", 8, *fp8)
    assert any("training.precision=fp8" in note for note in found.notes)
    # Each of the two tensor ranks holds half of a row under sequence parallel, in whole tiles of 128 tokens.
    assert found.shape.pack_multiple == 256
    with pytest.raises(SettingsError, match="training.precision=fp8 .* cannot run: this machine has no CUDA"):
        plan_run(found.settings, 8)
    with pytest.raises(SettingsError, match="needs multiples of 128; model.intermediate_size leaves a rank 1728"):
        plan(folder, "Qwen2.5-14B", 8, *fp8, "--parallel.tensor=8")


def test_what_does_not_fit_a_node_is_said(folder):
    with pytest.raises(SettingsError, match="8 processes cannot be split into parallel.tensor=8 × parallel.pipeline=4"):
        plan(folder, "Llama-3.1-70B", 8)


@pytest.mark.parametrize(
    ("script", "name", "environment", "says"),
    [
        (
            "slurm.sh",
            "Llama-3.1-70B",
            {"NNODES": "16"},
            "128 = tensor 8 × pipeline 4 (× 5 chunks) × context 1 × data 4",
        ),
        ("single_gpu.sh", "Llama-3.1-8B", {}, "1 = tensor 1 × pipeline 1 × context 1 × data 1"),
    ],
)
def test_the_scripts_themselves(folder, script, name, environment, says):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["bash", f"pretrain_scripts/{script}", name, *arguments(folder, name), "--dry_run"]
    environment = cli.environment() | {"PATH": path} | environment
    result = subprocess.run(command, env=environment, cwd=cli.ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and "no weights" not in result.stderr


def test_an_unknown_configuration_lists_those_that_are_there():
    result = subprocess.run(
        ["bash", "pretrain_scripts/node.sh", "GPT-5"], cwd=cli.ROOT, capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 2
    assert "Llama-3.1-70B" in result.stderr and "quickstart" in result.stderr
