"""Configurations as the planner reads and writes them; those of `pretrain_scripts/configs` fit what they are meant for."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.commands.plan import main
from megatron_sstoken.config import HardwareSettings, Settings
from megatron_sstoken.gpus import GPUS
from megatron_sstoken.model.presets import MODELS, find_architecture
from megatron_sstoken.planner.configuration import (
    problems_of_configuration,
    read_configuration,
    to_yaml,
    with_layout,
)
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.search import estimate, propose
from megatron_sstoken.planner.workload import Workload
from tests.helpers import cli

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's own
FOLDER = cli.ROOT / "pretrain_scripts" / "configs"
CONFIGURATIONS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALLEST = {
    "Llama-3.2-1B": 1,
    "Llama-3.2-3B": 1,
    "Llama-3.1-8B": 4,
    "Qwen2.5-7B": 4,
    "Qwen2.5-14B": 8,
    "Llama-3.1-70B": 32,
}
"""Number of GPUs that the first line of a configuration says it runs on."""


def read(name: str, *more: str) -> Settings:
    return parse_settings(["--config", str(FOLDER / f"{name}.yaml"), *more], program="test", description="")[0]


def planned(configured):
    assert problems_of_configuration(configured) == []
    return estimate(configured.workload, GPUS[configured.settings.hardware.gpu], Assumptions())


def test_every_configuration_says_for_how_many_gpus_it_is():
    stated = {name: read(name, "--model.hf_path=model").hardware.gpus for name in CONFIGURATIONS}
    assert stated.pop("quickstart") is None  # for CPUs
    assert stated.keys() == set(MODELS) == SMALLEST.keys() and all(stated.values())


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_fits_its_gpus_and_wastes_no_time(name):
    configured = read_configuration(read(name))
    assert configured.workload.architecture == find_architecture(name)
    found = planned(configured)
    assert found.excess <= 0, f"{name} needs {found.excess / 2**30:.1f} GiB more"
    best = propose(configured.workload, found.gpu, found.assumptions, 1)[0]
    gain = best.speed.tokens_per_gpu / found.speed.tokens_per_gpu - 1
    print(f"{name}: {found.speed.tokens_per_gpu:,.0f} tokens/s/GPU, the fastest that fits {gain:+.0%}")
    assert gain < 0.1, best.workload


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_fits_the_fewest_gpus_that_it_speaks_of(name):
    assert planned(read_configuration(read(name), SMALLEST[name])).excess <= 0
    if name in ("Llama-3.1-8B", "Qwen2.5-7B"):
        assert planned(read_configuration(read(name), 2)).excess > 0


def test_70b_is_faster_than_with_whole_layers_computed_again():
    """On 128 H100, with the layout that 32 GPUs hold: tensor 8 × pipeline 4 × 5 chunks, recompute full."""
    old = "--parallel.tensor=8 --parallel.virtual_pipeline=5 --training.recompute=full --optimizer.gradient_dtype=fp32".split()
    before, now = (planned(read_configuration(read("Llama-3.1-70B", *more))) for more in (old, []))
    print(f"{before.speed.tokens_per_gpu:.0f} → {now.speed.tokens_per_gpu:.0f} tokens/s/GPU")
    assert now.speed.tokens_per_gpu >= 1.4 * before.speed.tokens_per_gpu


def test_gpu_types_are_the_planners():
    hints = {field.name: field.type for field in dataclasses.fields(HardwareSettings)}
    assert hints["gpu"].__args__ == tuple(GPUS)


@given(
    tensor=st.sampled_from([1, 2]),
    stages=st.sampled_from([(1, 1, None, None), (2, 1, 10, None), (4, 2, 6, 6)]),
    precision=st.sampled_from(["bf16", "fp32", "fp8"]),
    selects=st.booleans(),
    lora=st.sampled_from([0, 8]),
    gradient=st.sampled_from(["fp32", "bf16"]),
    scope=st.sampled_from(["sample", "microbatch", "batch"]),
)
@settings(max_examples=40)
def test_a_workload_is_read_from_its_settings(tensor, stages, precision, selects, lora, gradient, scope):
    pipeline, chunks, first, last = stages
    w = Workload(
        find_architecture("Llama-3.1-8B"), world_size=16, tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks,
        first_stage_layers=first, last_stage_layers=last, sequence=tensor > 1, precision=precision, selects=selects,
        lora_rank=lora, gradient_dtype=gradient, scope=scope, rho=0.4, second_moment_dtype="fp8", offload_layers=3,
        offload_fraction=0.25, micro_batch_size=2, sequence_length=1024, head="standard", vocabulary_multiple=64,
    )  # fmt: skip
    assert Workload.of_settings(w.settings(), w.architecture, 16) == w


def test_a_written_configuration_is_read_back(tmp_path):
    changed = with_layout(read("Qwen2.5-7B"), read_configuration(read("Qwen2.5-14B")).workload, "h200")
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(changed), encoding="utf-8")
    again, _ = parse_settings(["--config", str(path)], program="test", description="")
    assert again == changed and again.parallel.virtual_pipeline == 4 and again.hardware.gpu == "h200"
    assert again.model.hf_path == "models/Qwen2.5-7B" and "loss_average" not in path.read_text()


def test_config_says_whether_it_fits_and_what_is_proposed(capsys):
    path = str(FOLDER / "Llama-3.1-8B.yaml")
    assert main(["--config", path]) == 0
    out, err = capsys.readouterr()
    assert "GPUs      8 × H100 SXM 80 GB = tensor 2 (sequence)" in out and "proposed: tensor 1" in out
    assert "note: models/Llama-3.1-8B is not here: estimated by the published architecture Llama-3.1-8B" in err
    assert main(["--config", path, "--world_size", "2"]) == 1
    assert "GiB too much" in (out := capsys.readouterr().out) and "proposed: nothing" in out
    assert main(["--config", path, "--world_size", "2", "--propose"]) == 1
    assert "there are layouts that fit with offload_fraction=1.0" in capsys.readouterr().err
    assert (
        main(["--config", path, "--world_size", "2", "--optimizer.offload_fraction=1", "--training.recompute=full"])
        == 0
    )
    assert "GiB of a rank in its host's memory" in capsys.readouterr().out
    more = ["--optimizer.gradient_dtype=bf16", "--training.recompute=full"]
    assert main(["--config", path, "--gpu", "h200", "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["workload"]["gradient_dtype"], found["workload"]["recompute"]) == ("bf16", "full")
    assert found["gpu"]["name"].startswith("H200")


def test_yaml_is_the_proposal_as_a_configuration(capsys, tmp_path):
    path = tmp_path / "proposed.yaml"
    assert main(["--config", str(FOLDER / "Llama-3.1-8B.yaml"), "--world_size", "16", "--yaml"]) == 0
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["world_size"] == 16
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["hardware"]["gpus"] == 16 and content["checkpoint"]["directory"] == "runs/Llama-3.1-8B"
    assert main(["--model", "Llama-3.2-1B", "--yaml", "--gpu", "a100-80"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["model"]["hf_path"] == "models/Llama-3.2-1B" and content["hardware"] == {"gpus": 1, "gpu": "a100-80"}


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--tensor", "4"], 2, "--tensor cannot go with --config: change the setting, as --section.tensor=VALUE"),
        (["--plain"], 2, "use --selection.method=full"),
        (["--parallel.tensor=3"], 2, "parallel.tensor=3 does not divide model.num_attention_heads=32"),
        (["--training.recompute=full", "--training.offload_layers=2"], 2, "training.offload_layers=2 cannot go with"),
        (["--no_such_option"], 2, "unrecognized arguments: --no_such_option"),
        (["--model.hf_path=/nowhere/model"], 2, "'/nowhere/model' is neither a folder nor in the presets"),
    ],
)
def test_mistakes_beside_a_configuration(capsys, more, code, says):
    try:
        found = main(["--config", str(FOLDER / "Llama-3.1-8B.yaml"), *more])
    except SystemExit as end:
        found = end.code
    assert found == code and says in capsys.readouterr().err


def test_a_configuration_without_a_model_or_a_number_of_gpus(capsys, tmp_path):
    assert main(["--config", str(FOLDER / "quickstart.yaml")]) == 2
    assert "hardware.gpus is not set: set it, or name --world_size" in capsys.readouterr().err
    assert main(["--config", str(FOLDER / "quickstart.yaml"), "--world_size", "1"]) == 2
    assert "model.hf_path is not set" in capsys.readouterr().err
