"""What people mistype or name by mistake: one line with the name as they typed it, the rule and the remedy; exit code 2.

Most of the table is told before torch is imported; the rest by the plan of the run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sstoken import score, train
from megatron_sstoken.config import Settings
from megatron_sstoken.validate.first import path_problems
from tests.helpers import cli
from tests.helpers.workbench import make_model, make_samples, make_store

# What reads the settings calls what jsonargparse 4.49 renamed; the old name goes with its version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


GOOD = """\
model:
  hf_path: model
data:
  train: data
  sequence_length: 64
training:
  precision: fp32
  global_batch_size: 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    make_model(path / "model")
    make_store(path / "data", make_samples(20))
    (path / "good.yaml").write_text(GOOD)
    (path / "chat.jsonl").write_text('{"messages": []}\n')
    (path / "rows").mkdir()
    (path / "rows" / "part.jsonl").write_text("{}\n")
    (path / "cache" / "snapshots" / "a1").mkdir(parents=True)
    (path / "cache" / "snapshots" / "a1" / "config.json").write_text("{}")
    (path / "gguf").mkdir()
    (path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (path / "run" / "step_0000001").mkdir(parents=True)
    (path / "run" / "step_0000001" / "sstoken.json").write_text("{}")
    (path / "split" / "train").mkdir(parents=True)
    (path / "split" / "train" / "manifest.json").write_text("{}")
    return path


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def refused(capsys, *arguments: str, main=train.main) -> list[str]:
    """The messages of a command that must end with exit code 2, without their `error: `."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert code == 2 and printed.out == "", printed
    assert all(line.startswith("error: ") for line in lines), printed.err
    return [line.removeprefix("error: ") for line in lines]


NAMES = {
    "runs/first.yaml": "belongs to no option: did you mean --config runs/first.yaml?",
    "selection.rho=0.5": "is not a setting: did you mean --selection.rho?",
    "nonsense": "belongs to no option: settings are given as --section.name=value",
    "--selection.roh=0.5": "is not a setting: did you mean --selection.rho?",
    "--training.rho=0.5": "is not a setting: did you mean --selection.rho?",
    "--rho=0.5": "is not a setting: did you mean --selection.rho?",
    "--hf_path=model": "is not a setting: did you mean --model.hf_path or --history.hf_path?",
    "--training.global-batch-size=2": "is not a setting: did you mean --training.global_batch_size?",
    "--dry-run": "is not an option: did you mean --dry_run?",
    "--lr=1e-5": "is not a setting: did you mean --optimizer.learning_rate?",
    "--training.stride=3": "is not a setting: --help lists what there is",
    "--training.preci=bf16": "is not a setting: did you mean --training.precision?",
}


def test_names_on_the_command_line(here, capsys):
    """All of them in one line: each is told, once, as it was typed."""
    told = refused(capsys, "--config", "good.yaml", *NAMES)
    names = [typed if typed == "runs/first.yaml" else typed.partition("=")[0] for typed in NAMES]
    assert sorted(told) == sorted(f"{name} {rest}" for name, rest in zip(names, NAMES.values(), strict=True))


VALUES = {
    "--selection.rho=60%": " is not a number or auto: did you mean 0.6? (Share of the response tokens to train on, in (0, 1];",
    "--training.epochs=two": " is not a whole number: use one, as 1 (Passes over the data; ",
    "--training.steps": " has no value: give it one, as --training.steps=1",
    "--training.precision=fp16": " is unknown: use fp32, bf16 or fp8",
    "--training.recompute=selectiv": " is unknown: did you mean selective? use none, selective or full",
    "--world_size=x": ": give a whole number",
    "--lora.targets=[q_porj]": ": q_porj is unknown: did you mean q_proj? use q_proj, k_proj, ",
    "--training.seed=1180591620717411303424": " is outside [0, 4294967295]: use a value in it",
    "--checkpoint.resume=maybe": " is not true or false or a whole number: use one, as true (",
    "--selection.layer=last": " is not a whole number or a list as [0, 1]: use one, as -1 (",
}


def test_values_on_the_command_line(here, capsys):
    """With the choices, or the first sentence of the setting's documentation. Rules are told with them (the seed)."""
    typed = [one for one in VALUES if "=" in one] + ["--training.steps"]
    told = refused(capsys, "--config", "good.yaml", *typed)
    for one in typed:
        assert sum(line.removeprefix("--").startswith(one.removeprefix("--") + VALUES[one]) for line in told) == 1, told
    assert len(told) == len(typed)


def test_all_linear_stands_for_linears_alone(here, capsys):
    told = refused(capsys, "--config", "good.yaml", "--lora.rank=4", "--lora.train_whole=all-linear")
    assert told == ["lora.train_whole=[all-linear]: all-linear is unknown: use embed_tokens or lm_head"]


FILES = {
    "god.yaml": "cannot be read (No such file or directory): did you mean good.yaml? name a YAML file",
    ".": "cannot be read (Is a directory): name a YAML file",
    "model/model.safetensors": "is not text in UTF-8: name a YAML file",
}


def test_files_that_are_no_configurations(here, capsys):
    told = refused(capsys, *(f"--config={path}" for path in FILES))
    assert told == [
        f"--config {path} {rest}" for path, rest in FILES.items()
    ]  # and nothing that is not set because of them


PREPARE = "make one with `python tools/prepare_data.py --input {} --tokenizer MODEL --output FOLDER`, and name that"
FROM_GGUF = (
    "make a Hugging Face folder of it with `python tools/convert_checkpoint.py from-gguf --gguf gguf/model.gguf "
    "--output FOLDER`, and name that"
)
PATHS = {
    ("model.hf_path", "meta/Llama-1B"): "does not exist here, and looks like a name on the Hugging Face hub: "
    "`hf download meta/Llama-1B --local-dir models/Llama-1B`, and name that folder",
    ("model.hf_path", "models/Llama-1B"): "does not exist: name the folder of a Hugging Face checkpoint",
    ("model.hf_path", "modle"): "does not exist: did you mean model? name the folder of a Hugging Face checkpoint",
    ("model.hf_path", "cache"): "is a folder of the hub's cache: name cache/snapshots/a1",
    (
        "model.hf_path",
        "run",
    ): "has no config.json, it holds checkpoints of a run: name it with model.checkpoint, and here the "
    "Hugging Face folder that the run started from",
    ("model.hf_path", "."): "has no config.json: did you mean model?",
    ("model.hf_path", "gguf/model.gguf"): f"is a GGUF file: {FROM_GGUF}",
    ("model.hf_path", "gguf"): f"has no config.json, it holds model.gguf: {FROM_GGUF}",
    (
        "history.hf_path",
        "good.yaml",
    ): "is a file: name a Hugging Face folder (config.json, *.safetensors, tokenizer.json)",
    ("data.train", "chat.jsonl"): f"is not a prepared folder: {PREPARE.format('chat.jsonl')}",
    ("data.train", "rows"): f"is not a prepared folder: {PREPARE.format('rows')}",
    ("data.train", "split"): "holds several prepared folders: name one, as split/train",
    (
        "data.validation",
        "tatsu-lab/alpaca",
    ): "does not exist here, and looks like a name on the Hugging Face hub: `hf download "
    f"tatsu-lab/alpaca --repo-type dataset --local-dir datasets/alpaca`, then {PREPARE.format('datasets/alpaca')}",
}


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_paths_of_another_kind(here, name, path):
    assert path_problems(changed(name, path)) == [f"{name}: {path} {PATHS[name, path]}"]


@pytest.mark.parametrize("name", ["checkpoint.directory", "logging.directory", "history.store"])
def test_folders_that_cannot_be_written(here, name):
    for path, why in (
        ("/proc/x", "/proc: No such file"),
        ("good.yaml/x", f"{here}/good.yaml is not a writable folder"),
    ):
        (told,) = path_problems(changed(name, path))
        assert told.startswith(f"{name}={path} cannot be written: {why}")
    before = sorted(here.rglob("*"))
    assert path_problems(changed(name, "deep/new/folder")) == [] and sorted(here.rglob("*")) == before


def test_paths_are_told_with_all_else(here, capsys):
    told = refused(
        capsys, "--config", "good.yaml", "--data.train=chat.jsonl", "--checkpoint.directory=/proc/x", "--rho=2"
    )
    assert [line.split()[0] for line in told] == [
        "--rho",
        "selection.rho=2.0",
        "data.train:",
        "checkpoint.directory=/proc/x",
    ]


def changed(name: str, value) -> Settings:
    """The good settings with one changed."""
    settings = Settings()
    settings.model.hf_path, settings.data.train = "model", "data"
    section, _, key = name.partition(".")
    setattr(getattr(settings, section), key, value)
    return settings


IN_YAML = {
    "selection: {roh: 0.5}": "line 9: selection.roh is not a setting: did you mean selection.rho?",
    "selection:\n  epsilon: 1": "line 10: selection.epsilon is not a setting: did you mean optimizer.epsilon?",
    "rho: 0.5": "line 9: rho is not a setting: did you mean selection.rho?",
    "login: {every: 1}": "line 9: login is not a section: did you mean logging?",
    "optimizer: 1": "line 9: optimizer is a section: write its settings below it, indented",
    "optimizer:\n  learning_rate:": "line 10: optimizer.learning_rate is empty: give it a value, or leave the line out",
    "training:\n  steps: 1": "line 9: training is there twice (line 6): make one of them",
    "selection:\n  rho: 60%": "line 10: selection.rho=60% is not a number or auto: did you mean 0.6?",
    "selection: {scope: bach}": "line 9: selection.scope=bach is unknown: did you mean batch? use sample, microbatch, ",
}


@pytest.mark.parametrize("lines", IN_YAML)
def test_in_a_file(here, tmp_path, capsys, lines):
    file = tmp_path / "my.yaml"
    file.write_text(GOOD + lines + "\n")
    (told,) = refused(capsys, "--config", str(file))
    assert told.startswith(f"{file}, {IN_YAML[lines]}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model:\n\thf_path: x\n", ", line 2, column 1: a tab: indent with spaces"),
        ("model:\n  hf_path: x\n   head: y\n", ", line 3, column 8: mapping values are not allowed"),
        ("just words\n", " holds no settings: write `section:`, and below it `  name: value`"),
    ],
)
def test_a_file_that_is_not_yaml_is_told_by_itself(tmp_path, capsys, text, told):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert [told in line for line in refused(capsys, "--config", str(file))] == [True]


def test_all_mistakes_at_once(here, capsys, tmp_path):
    file = tmp_path / "five.yaml"
    file.write_text(GOOD.replace("fp32", "fp16") + "selection:\n  roh: 7\n  gamma: 3\nlogin: {every: 0}\n")
    told = refused(capsys, "--config", str(file), "--training.epochs=two", "--data.train=nowhere", "stray")
    for part in (
        "selection.roh is not",
        "login is not",
        "fp16 is unknown",
        "epochs=two",
        "gamma=3.0 is outside",
        "stray belongs",
    ):
        assert sum(part in line for line in told) == 1, told
    # What is surely meant is read on: its value is looked at, too.
    assert sum("selection.rho=7.0 is outside" in line or "logging.every=0 is too small" in line for line in told) == 2
    assert sum("data.train: nowhere does not exist" in line for line in told) == 1 and len(told) == 9


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    code = train.main(["--config", "good.yaml", "--dry_run", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--training.micro_batch_size=1000000", "training.micro_batch_size=1000000 is more than the "),
        ("--selection.method=sstokn", "selection.method=sstokn is unknown: did you mean sstoken? use one of"),
        ("--history.source=frozn", "history.source=frozn is unknown: did you mean frozen? use one of"),
        ("--training.precision=fp8", "training.precision=fp8 with training.fp8_recipe=tensorwise cannot run: "),
        (
            "--lora.rank=100000",
            "lora.rank=100000 is above the smaller side of every weight in lora.targets (at most 32)",
        ),
    ],
)
def test_what_the_plan_refuses(here, capsys, typed, told):
    (line,) = refused(capsys, "--config", "good.yaml", "--dry_run", typed)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--training.global_batch_size=1000", "training.global_batch_size=1000 is more than the "),
        ("--data.sequence_length=24", "data.sequence_length=24 cuts "),
        ("--lora.rank=20", "lora.rank=20 is above the smaller side of k_proj, v_proj (16 of k_proj)"),
        (
            "--training.epochs=1",
            "model.hf_path=model has no tokenizer, and neither will an export: copy tokenizer.json",
        ),
    ],
)
def test_what_the_plan_notes(here, capsys, typed, told):
    code, printed, _ = plan(capsys, typed)
    assert code == 0 and sum(line.startswith("note") and told in line for line in printed.splitlines()) == 1, printed


def test_a_plan_for_other_machines_only_notes_what_this_one_lacks(here, capsys):
    code, printed, _ = plan(capsys, "--training.precision=fp8", "--training.fp8_recipe=delayed", "--world_size=1")
    assert code == 0 and "fp8 with training.fp8_recipe=delayed cannot run" in printed


def test_what_is_understood(here, capsys, tmp_path):
    """An empty section, PEFT's word for all linears, words with commas, and the same names in a file."""
    file = tmp_path / "my.yaml"
    file.write_text(GOOD + "logging:\nlora: {rank: 4, targets: all-linear}\nselection.rho: 0.25\n")
    assert train.main(["--config", str(file), "--dry_run"]) == 0
    assert (
        "rho 0.25" in (printed := capsys.readouterr().out) and "on q_proj, k_proj, v_proj, o_proj, gate_proj" in printed
    )
    _, printed, _ = plan(capsys, "--lora.rank=4", "--lora.targets=q_proj,v_proj")
    assert "on q_proj, v_proj" in printed


def test_scoring_needs_an_output_and_no_place_for_checkpoints(here, capsys):
    told = refused(capsys, "--config", "good.yaml", "--checkpoint.directory=/proc/x", main=score.main)
    assert told == ["--output is not given: Parquet file to write."]


IMPORTED = """
import json, sys
from megatron_sstoken import train
try:
    train.main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps([stop.code, [name for name in ("torch", "megatron.core", "transformers") if name in sys.modules]]))
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--selection.roh=1"], 2), (["--help"], 0), (["--print_schema"], 0)])
def test_mistakes_and_help_wait_for_neither_torch_nor_megatron(here, arguments, code):
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED, "--config", "good.yaml", *arguments]
    result = subprocess.run(command, env=cli.environment(), capture_output=True, text=True, timeout=60)
    assert json.loads(result.stdout.splitlines()[-1]) == [code, []], result.stderr


def test_under_the_launcher_a_mistake_stands_alone(here):
    config = os.path.abspath("good.yaml")
    result = cli.run(cli.launch_command(2, "megatron_sstoken.train", "--config", config, "--selection.roh=1"))
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if "model.hf_path" not in line and "data.train" not in line]
    assert told == ["error: --selection.roh is not a setting: did you mean --selection.rho?"]
