"""Settings: their names, their rules, and how they are read."""

import dataclasses
import math

import pytest

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.validate.settings import problems_of

# jsonargparse 4.49 renamed what `parse_settings` calls; the old name goes with version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What issues 2 and 4 fix: other tools rely on these names.
FIXED_NAMES = {
    "model": "hf_path checkpoint",
    "parallel": "tensor pipeline virtual_pipeline context sequence",
    "data": "train validation sequence_length",
    "selection": "method rho gamma layer scope rel_floor warmup_samples",
    "history": "source hf_path",
    "lora": "rank alpha dropout targets",
    "optimizer": "learning_rate",
    "training": "micro_batch_size global_batch_size steps epochs seed precision",
    "checkpoint": "directory save_every keep resume",
    "logging": "directory every records_every",
}
# What was added since; a name that goes from here breaks somebody's YAML.
MORE_NAMES = {
    "model": "vocabulary_multiple",
    "data": "too_long packing shuffle",
    "selection": "rho_min rho_max loss_average",
    "history": "store",
    "optimizer": "min_learning_rate schedule warmup_fraction weight_decay beta1 beta2 epsilon clip_grad",
    "training": "recompute validate_every",
}
CHOICES = {
    "selection.scope": ("sample", "microbatch", "batch"),
    "selection.loss_average": ("token", "sample", "microbatch"),
    "training.precision": ("fp32", "bf16"),
    "data.too_long": ("truncate", "drop"),
    "optimizer.schedule": ("linear", "cosine", "constant"),
    "training.recompute": ("none", "selective", "full"),
}
DRY_RUN = {"dry_run": {"action": "store_true", "help": "Train nothing."}}


def settings_with(**changes) -> Settings:
    """Settings that have no problem, changed: `section__name=value`."""
    settings = Settings()
    settings.model.hf_path, settings.data.train = "model", "data"
    for name, value in changes.items():
        section, key = name.split("__")
        assert hasattr(getattr(settings, section), key), name
        setattr(getattr(settings, section), key, value)
    return settings


def parse(*arguments: str, extra=None) -> Settings:
    return parse_settings(list(arguments), program="program", description="A program.", extra=extra)[0]


def value_of(settings: Settings, name: str):
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


def test_names_are_frozen():
    found = {
        section.name: {entry.name for entry in dataclasses.fields(section.default_factory)}
        for section in dataclasses.fields(Settings)
    }
    wanted = {
        section: set(names.split()) | set(MORE_NAMES.get(section, "").split()) for section, names in FIXED_NAMES.items()
    }
    assert found.keys() == wanted.keys()
    assert {section: wanted[section] - names for section, names in found.items()} == dict.fromkeys(wanted, set())


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name, capsys):
    for choice in CHOICES[name]:
        assert value_of(parse(f"--{name}={choice}"), name) == choice
    with pytest.raises(SystemExit) as stop:
        parse(f"--{name}=nonsense")
    assert stop.value.code == 2
    message = capsys.readouterr().err.split("error:")[1]
    assert name in message and "nonsense" in message and all(choice in message for choice in CHOICES[name])


def test_defaults_are_the_papers_and_work_once_model_and_data_are_named():
    settings = settings_with()
    assert problems_of(settings) == []
    selection = settings.selection
    assert (selection.method, selection.rho, selection.gamma, selection.layer) == ("sstoken", 0.6, 0.5, -1)
    assert (selection.scope, selection.rel_floor, selection.warmup_samples) == ("sample", 1e-3, 0)
    assert settings.history.source == "frozen" and settings.checkpoint.resume is True


# Changes that break one rule → the whole message.
BROKEN = {
    "no model": (
        {"model__hf_path": None},
        "model.hf_path is not set: name a Hugging Face folder",
    ),
    "no data": (
        {"data__train": None},
        "data.train is not set: name a folder made by tools/prepare_data.py",
    ),
    "tensor": ({"parallel__tensor": 0}, "parallel.tensor=0 is too small: use 1 or more"),
    "pipeline": ({"parallel__pipeline": -1}, "parallel.pipeline=-1 is too small: use 1 or more"),
    "context": ({"parallel__context": 0}, "parallel.context=0 is too small: use 1 or more"),
    "virtual without pipeline": (
        {"parallel__virtual_pipeline": 2},
        "parallel.virtual_pipeline=2 needs parallel.pipeline > 1, which is 1: use virtual_pipeline=1",
    ),
    "sequence without tensor": (
        {"parallel__sequence": True},
        "parallel.sequence=true needs parallel.tensor > 1, which is 1: use sequence=false",
    ),
    "vocabulary": (
        {"model__vocabulary_multiple": 0},
        "model.vocabulary_multiple=0 is too small: use 1 or more",
    ),
    "length": ({"data__sequence_length": 1}, "data.sequence_length=1 is too small: use 2 or more"),
    "rho 0": ({"selection__rho": 0.0}, "selection.rho=0.0 is outside (0, 1]: use the share to keep, as 0.6"),
    "rho 60": (
        {"selection__rho": 60.0},
        "selection.rho=60.0 is outside (0, 1]: use the share to keep, as 0.6",
    ),
    "rho nan": (
        {"selection__rho": math.nan},
        "selection.rho=nan is outside (0, 1]: use the share to keep, as 0.6",
    ),
    "rho auto of unbounded scores": (
        {"selection__rho": "auto", "selection__method": "random"},
        "selection.rho=auto needs scores between 0 and 1, which selection.method=random does not give: "
        "use sstoken or rel or attention, or a number",
    ),
    "least rho": (
        {"selection__rho_min": 0.0},
        "selection.rho_min=0.0 is outside (0, 1]: use the share to keep, as 0.6",
    ),
    "greatest rho": (
        {"selection__rho_max": 1.1},
        "selection.rho_max=1.1 is outside (0, 1]: use the share to keep, as 0.6",
    ),
    "rhos": (
        {"selection__rho_min": 0.5, "selection__rho_max": 0.4},
        "selection.rho_min=0.5 is above selection.rho_max=0.4: use a smaller rho_min",
    ),
    "no layer": ({"selection__layer": []}, "selection.layer=[] names no layer: use -1 for the last"),
    "gamma": ({"selection__gamma": 1.5}, "selection.gamma=1.5 is outside [0, 1]: use a value in it"),
    "gamma below": ({"selection__gamma": -0.1}, "selection.gamma=-0.1 is outside [0, 1]: use a value in it"),
    "floor": ({"selection__rel_floor": -1.0}, "selection.rel_floor=-1.0 is too small: use 0 or more"),
    "warm-up": ({"selection__warmup_samples": -1}, "selection.warmup_samples=-1 is too small: use 0 or more"),
    "decay": ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay=-0.1 is too small: use 0 or more"),
    "clip": ({"optimizer__clip_grad": -1.0}, "optimizer.clip_grad=-1.0 is too small: use 0 or more"),
    "least rate": (
        {"optimizer__min_learning_rate": -1.0},
        "optimizer.min_learning_rate=-1.0 is too small: use 0 or more",
    ),
    "rates": (
        {"optimizer__min_learning_rate": 0.1},
        "optimizer.min_learning_rate=0.1 is above optimizer.learning_rate=1e-05: use a smaller one",
    ),
    "fraction": (
        {"optimizer__warmup_fraction": 1.01},
        "optimizer.warmup_fraction=1.01 is outside [0, 1]: use a value in it",
    ),
    "beta1": ({"optimizer__beta1": 1.0}, "optimizer.beta1=1.0 is outside [0, 1): use 0.9 to 0.999"),
    "beta2": ({"optimizer__beta2": -0.5}, "optimizer.beta2=-0.5 is outside [0, 1): use 0.9 to 0.999"),
    "epsilon": ({"optimizer__epsilon": 0.0}, "optimizer.epsilon=0.0 must be above 0: use 1e-8"),
    "micro": ({"training__micro_batch_size": 0}, "training.micro_batch_size=0 is too small: use 1 or more"),
    "global": (
        {"training__global_batch_size": 0},
        "training.global_batch_size=0 is too small: use 1 or more",
    ),
    "epochs": ({"training__epochs": 0}, "training.epochs=0 is too small: use 1 or more"),
    "steps": ({"training__steps": 0}, "training.steps=0 is too small: use 1 or more"),
    "keep": ({"checkpoint__keep": -1}, "checkpoint.keep=-1 is too small: use 0 or more"),
    "every": ({"logging__every": 0}, "logging.every=0 is too small: use 1 or more"),
    "save": ({"checkpoint__save_every": 5}, "checkpoint.save_every=5 needs checkpoint.directory: name one, or use 0"),
    "save below": (
        {"checkpoint__save_every": -1, "checkpoint__directory": "runs"},
        "checkpoint.save_every=-1 is too small: use 0 or more",
    ),
    "validate": (
        {"training__validate_every": 5},
        "training.validate_every=5 needs data.validation: name a prepared folder, or use 0",
    ),
    "validate below": (
        {"training__validate_every": -1, "data__validation": "held out"},
        "training.validate_every=-1 is too small: use 0 or more",
    ),
    "records": (
        {"logging__records_every": 5},
        "logging.records_every=5 needs logging.directory (or checkpoint.directory): name one, or use 0",
    ),
    "records below": (
        {"logging__records_every": -1, "logging__directory": "logs"},
        "logging.records_every=-1 is too small: use 0 or more",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule(name):
    changes, message = BROKEN[name]
    assert problems_of(settings_with(**changes)) == [message]


def test_unknown_history_source_is_told_the_known_ones():
    problem = "history.source=yesterday is unknown: use one of adapters_off, frozen"
    assert problems_of(settings_with(history__source="yesterday")) == [problem]


def test_unknown_method_is_told_the_known_ones():
    (problem,) = problems_of(settings_with(selection__method="best"))
    assert problem.startswith("selection.method=best is unknown: use one of ")
    known = problem.split("use one of ")[1].split(", or ")[0].split(", ")
    assert {"sstoken", "full", "random"} <= set(known)
    assert all(problems_of(settings_with(selection__method=method)) == [] for method in known)


def test_rho_with_too_many_decimals():
    for name in ("rho", "rho_min"):
        (problem,) = problems_of(settings_with(**{f"selection__{name}": 1 / 3}))
        assert problem.startswith(f"selection.{name}={1 / 3} has ") and "round it" in problem
    assert problems_of(settings_with(selection__rho=0.333333333)) == []


def test_impossible_virtual_pipeline_and_negative_rate_are_named():
    assert "parallel.virtual_pipeline=0 is too small: use 1 or more" in problems_of(
        settings_with(parallel__virtual_pipeline=0)
    )
    assert "optimizer.learning_rate=-1.0 is too small: use 0 or more" in problems_of(
        settings_with(optimizer__learning_rate=-1.0)
    )
    assert "optimizer.learning_rate=nan is too small: use 0 or more" in problems_of(
        settings_with(optimizer__learning_rate=math.nan)
    )


# Values on the border of a rule, and combinations that make a setting possible.
ALLOWED = (
    {"selection__rho": 1.0},
    {"selection__rho": 1e-9},
    {"selection__rho": "auto"},
    {
        "selection__rho": "auto",
        "selection__method": "rel",
        "selection__rho_min": 1.0,
        "selection__rho_max": 1.0,
    },
    {"selection__layer": [0, -1]},
    {"selection__gamma": 0.0},
    {"selection__gamma": 1.0},
    {"selection__rel_floor": 0.0},
    {"data__sequence_length": 2},
    {"model__vocabulary_multiple": 1},
    {"optimizer__learning_rate": 0.0},
    {"optimizer__min_learning_rate": 1e-5},
    {"optimizer__warmup_fraction": 1.0},
    {"optimizer__beta1": 0.0},
    {"optimizer__clip_grad": 0.0},
    {"training__steps": 1},
    {"checkpoint__keep": 0},
    {"parallel__tensor": 2, "parallel__sequence": True},
    {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    {"parallel__context": 2},
    {"checkpoint__save_every": 1, "checkpoint__directory": "runs"},
    {"training__validate_every": 1, "data__validation": "held out"},
    {"logging__records_every": 1, "logging__directory": "logs"},
    {"logging__records_every": 1, "checkpoint__directory": "runs"},
)


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_allowed(changes):
    assert problems_of(settings_with(**changes)) == []


def test_all_problems_at_once():
    problems = problems_of(Settings())
    assert [problem.split(" ")[0] for problem in problems] == ["model.hf_path", "data.train"]
    error = SettingsError(problems)
    assert error.problems == problems and str(error) == "\n".join(problems)


def test_logging_directory_follows_the_checkpoints():
    assert settings_with().logging_directory is None
    assert settings_with(checkpoint__directory="runs/1").logging_directory == "runs/1/logs"
    assert settings_with(checkpoint__directory="runs", logging__directory="here").logging_directory == "here"


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


OLD_NAME_NOTE = "note: model.implementation is now model.backend: the old name goes with the next version\n"


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


def test_only_rank_0_tells_of_the_old_name(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert parse("--model.implementation=torch").model.backend == "torch"
    assert capsys.readouterr() == ("", "")


def test_other_ranks_exit_in_silence(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
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
    assert settings.training.seed == 3 and options == {"dry_run": True}
