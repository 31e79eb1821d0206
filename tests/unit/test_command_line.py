"""How settings are read: YAML and command line, mistakes, old names, help."""

import dataclasses
import math

import pytest

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import Settings

# jsonargparse 4.49 renamed what `parse_settings` calls; the old name goes with version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHOICES = {
    "selection.scope": ("sample", "microbatch", "batch"),
    "weights.divisor": ("selected", "response", "weight"),
    "selection.loss_average": ("token", "sample", "microbatch"),
    "training.precision": ("fp32", "bf16"),
    "data.too_long": ("truncate", "drop"),
    "optimizer.schedule": ("linear", "cosine", "constant"),
    "training.recompute": ("none", "selective", "full"),
}
DRY_RUN = {"dry_run": {"action": "store_true", "help": "Train nothing."}}


def parse(*arguments: str, extra=None) -> Settings:
    return parse_settings(list(arguments), program="program", description="A program.", extra=extra)[0]


def value_of(settings: Settings, name: str):
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name, capsys):
    for choice in CHOICES[name]:
        assert value_of(parse(f"--{name}={choice}"), name) == choice
    with pytest.raises(SystemExit) as stop:
        parse(f"--{name}=nonsense")
    assert stop.value.code == 2
    message = capsys.readouterr().err.split("error:")[1]
    assert name in message and "nonsense" in message and all(choice in message for choice in CHOICES[name])


def test_a_mistake_is_not_buried_under_the_names_of_all_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--training.stride=3")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --training.stride is not a setting: --help lists what there is\n"


def test_later_settings_win(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training:\n  seed: 1\n  steps: 11\noptimizer: {learning_rate: 3e-4}\n")
    second.write_text("training:\n  seed: 2\n")
    settings = parse("--config", str(first), "--config", str(second), "--training.epochs=5")
    assert (settings.training.seed, settings.training.steps, settings.training.epochs) == (2, 11, 5)
    assert settings.optimizer.learning_rate == 3e-4
    assert parse("--config", str(first), "--training.seed=7").training.seed == 7
    assert parse("--training.seed=7", "--config", str(first)).training.seed == 1


def test_a_share_is_a_number_or_auto_and_a_layer_a_number_or_a_list():
    settings = parse("--selection.rho=auto", "--selection.layer=[0, -1]")
    assert settings.selection.rho == "auto" and settings.selection.layer == [0, -1]
    settings = parse("--selection.rho=0.25", "--selection.layer=3")
    assert settings.selection.rho == 0.25 and settings.selection.layer == 3


def test_values_are_typed():
    settings = parse("--parallel.sequence=true", "--training.steps=null", "--model.hf_path=12", "--selection.layer=-2")
    assert settings.parallel.sequence is True and settings.training.steps is None
    assert settings.model.hf_path == "12" and settings.selection.layer == -2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.steps=many"], ("training.steps", "many")),
        (["--parallel.tensor=1.5"], ("parallel.tensor", "1.5")),
        (["--parallel.sequence=perhaps"], ("parallel.sequence", "perhaps")),
        (["--training.nonsense=1"], ("training.nonsense",)),
        (["--config=/nowhere/file.yaml"], ("/nowhere/file.yaml",)),
    ],
)
def test_mistakes_exit_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.split("error:")[1]
    assert all(word in message for word in words)


def test_unknown_name_in_yaml_exits_with_2(tmp_path, capsys):
    (tmp_path / "file.yaml").write_text("training:\n  sede: 1\n")
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(tmp_path / "file.yaml"))
    assert stop.value.code == 2 and "sede" in capsys.readouterr().err


OLD_NAME_NOTE = "note: model.implementation is now model.backend: the old name will be removed in the next version\n"


def test_the_old_name_of_backend_works_for_one_version(tmp_path, capsys):
    for arguments in (["--model.implementation=torch"], ["--model.implementation", "torch"]):
        assert parse(*arguments).model.backend == "torch"
        assert capsys.readouterr().err == OLD_NAME_NOTE
    file = tmp_path / "old.yaml"
    file.write_text("model:\n  implementation: torch\n  hf_path: here\n")
    model = parse("--config", str(file)).model
    assert (model.backend, model.hf_path) == ("torch", "here") and capsys.readouterr().err == OLD_NAME_NOTE
    assert parse("--config", str(file), "--model.backend=auto").model.backend == "auto"  # later ones win, as ever
    assert parse("--model.backend=auto", "--config", str(file)).model.backend == "torch"


def test_the_old_name_takes_the_same_values_and_never_hides_the_new_one(tmp_path, capsys):
    file = tmp_path / "both.yaml"
    file.write_text("model: {implementation: torch, backend: auto}\n")
    for arguments in (["--model.implementation=nonsense"], ["--config", str(file)]):
        with pytest.raises(SystemExit) as stop:
            parse(*arguments)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_only_the_first_of_a_node_tells_of_the_old_name(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse("--model.implementation=torch").model.backend == "torch"
    assert capsys.readouterr() == ("", "")


def test_other_ranks_exit_in_silence(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse("--training.steps=many")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_printed_configuration_reads_back(tmp_path, capsys):
    arguments = ["--training.seed=7", "--optimizer.learning_rate=2e-5", "--model.hf_path=a folder/m"]
    arguments += ["--selection.rho=auto", "--selection.layer=[0, 1]"]
    with pytest.raises(SystemExit) as stop:
        parse(*arguments, "--print_config", extra=DRY_RUN)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert parse("--config", str(tmp_path / "printed.yaml"), extra=DRY_RUN) == parse(*arguments, extra=DRY_RUN)
    assert parse(*arguments, extra=DRY_RUN) != parse(extra=DRY_RUN)


@pytest.mark.parametrize("wrong", ["--training.stride=3", "--training.seed=x"])
def test_no_configuration_is_printed_where_something_is_wrong(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--print_config", wrong)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("error:") == 1


def test_what_yaml_can_say_is_read(tmp_path):
    """Anchors and merged mappings, numbers that are not finite, texts that look like numbers, and null."""
    file = tmp_path / "file.yaml"
    file.write_text(
        "optimizer: &one {beta1: 0.5, learning_rate: 3e-4}\n"
        "selection: {rule: threshold, threshold: -.inf, layer: [0, -1]}\n"
        "model: {hf_path: '12', checkpoint: null}\ntraining: {steps: null, timeout_minutes: .inf}\n"
    )
    settings = parse("--config", str(file))
    assert settings.optimizer.learning_rate == 3e-4 and settings.selection.threshold == -math.inf
    assert settings.selection.layer == [0, -1] and settings.training.timeout_minutes == math.inf
    assert (settings.model.hf_path, settings.model.checkpoint, settings.training.steps) == ("12", None, None)
    file.write_text("data: &d {sequence_length: 64}\nlogging:\n  <<: {every: 7}\n  entropy: true\n")
    assert vars(parse("--config", str(file)).logging) == vars(
        parse("--logging.every=7", "--logging.entropy=true").logging
    )


def test_a_value_may_stand_by_itself_and_a_missing_one_takes_no_option(capsys):
    assert parse("--training.seed", "3", "--selection.layer", "-2").selection.layer == -2
    with pytest.raises(SystemExit):
        parse("--training.seed", "--training.steps=3")
    assert capsys.readouterr().err == "error: --training.seed has no value: give it one, as --training.seed=1234\n"
    with pytest.raises(SystemExit) as stop:
        parse("-h")
    assert stop.value.code == 0


def test_help_documents_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", extra=DRY_RUN)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in dataclasses.fields(Settings):
        for entry in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{entry.name}" in text
    assert "Tensor parallel size: attention heads" in text and "Train nothing." in text


def test_extra_options_are_apart_from_settings():
    settings, options = parse_settings(
        ["--dry_run", "--training.seed=3"], program="program", description="A program.", extra=DRY_RUN
    )
    assert settings.training.seed == 3 and options == {"dry_run": True, "debug": False}
