"""Rules that need only the settings: each broken one is named with its remedy."""

import math

import pytest

from benchmarks.changes import apply
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.history.source import history_sources
from megatron_sstoken.selection.methods import find_method
from megatron_sstoken.validate.settings import problems_of


def settings_with(**changes) -> Settings:
    """Settings that have no problem, changed: `section__name=value`."""
    settings = Settings()
    settings.model.hf_path, settings.data.train = "model", "data"
    return apply(settings, **changes)


def test_defaults_are_the_papers_and_work_once_model_and_data_are_named():
    settings = settings_with()
    assert problems_of(settings) == []
    selection = settings.selection
    assert (selection.method, selection.rho, selection.gamma, selection.layer) == ("sstoken", 0.6, 0.5, -1)
    assert (selection.scope, selection.rel_floor, selection.warmup_samples) == ("sample", 1e-3, 0)
    assert settings.history.source == "frozen" and settings.checkpoint.resume is True


def test_weights_of_the_loss_alone_work_with_any_head():
    assert problems_of(settings_with(weights__method="power", weights__alpha=0.3, model__head="standard")) == []


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
    "weights that do not exist": (
        {"weights__method": "dft"},
        "weights.method=dft is unknown: did you mean deft? use one of none, power, deft, entropy, external, or the import path "
        "of a TokenWeight of your own",
    ),
    "exponent below 0": (
        {"weights__method": "power", "weights__alpha": -0.5},
        "weights.alpha=-0.5 is no exponent of a weight: use a number of 0 or more",
    ),
    "exponent of what has none": (
        {"weights__method": "deft", "weights__alpha": 0.5},
        "weights.alpha=0.5 is the exponent of weights.method=power or entropy, and the method is deft: leave it out, or use "
        "one of these",
    ),
    "exponent of nothing": (
        {"weights__alpha": 0.5},
        "weights.alpha=0.5 is the exponent of weights.method=power or entropy, and the method is not set: leave it out, or use "
        "one of these",
    ),
    "weights that the head does not tell": (
        {"weights__method": "entropy", "model__head": "standard"},
        "weights.method=entropy weighs by entropy_top20, which model.head=standard does not tell: use model.head=selective",
    ),
    "visits without a place": (
        {"history__source": "previous_visit"},
        "history.source=previous_visit keeps the losses of every epoch in checkpoint.directory, which is not set: name one, or "
        "use history.source=frozen",
    ),
    "first visits of another source": (
        {"history__first_visit": "full"},
        "history.first_visit=full is not used by history.source=frozen: leave it out, or use source=previous_visit",
    ),
    "a store for first visits in full": (
        {
            "history__source": "previous_visit",
            "history__first_visit": "full",
            "history__store": "a",
            "checkpoint__directory": "b",
        },
        "history.store=a is not used with history.first_visit=full, which scores nothing: leave it out, or use "
        "first_visit=frozen",
    ),
    "tensor": ({"parallel__tensor": 0}, "parallel.tensor=0 is too small: use 1 or more"),
    "pipeline": ({"parallel__pipeline": -1}, "parallel.pipeline=-1 is too small: use 1 or more"),
    "context": ({"parallel__context": 0}, "parallel.context=0 is too small: use 1 or more"),
    "virtual without pipeline": (
        {"parallel__virtual_pipeline": 2},
        "parallel.virtual_pipeline=2 needs parallel.pipeline > 1, which is 1: use virtual_pipeline=1",
    ),
    "all explored": (
        {"selection__explore": 1.0},
        "selection.explore=1.0 is outside [0, 1): use the share to draw at random, as 0.1",
    ),
    "explored too finely": (
        {"selection__explore": 0.1234567891},
        "selection.explore=0.1234567891 has more than 9 decimals: round it to 9 or fewer",
    ),
    "drift raises what is chosen": (
        {"selection__on_drift": "raise_rho", "selection__rho": "auto"},
        "selection.on_drift=raise_rho needs a number for selection.rho, which is auto: use one, or on_drift=explore",
    ),
    "drift raises no share": (
        {"selection__method": "probability", "selection__rule": "threshold", "selection__threshold": 0.1}
        | {"selection__on_drift": "raise_rho"},
        "selection.on_drift=raise_rho needs a share to raise, and no share selects here: use warn or explore",
    ),
    "exploring beside a choice": (
        {"selection__method": "history_probability", "selection__scope": "dataset", "selection__explore": 0.1},
        "selection.explore=0.1 with on_drift=warn: tokens that were chosen before training give way to none: use explore=0 and "
        "on_drift=warn",
    ),
    "drift from another model": (
        {"selection__on_drift": "explore", "history__hf_path": "other"},
        "selection.on_drift=explore compares the model with its own past, and history.hf_path=other names another one: leave "
        "one of them out (selection.explore alone explores from the start)",
    ),
    "drift at once": ({"selection__drift_steps": 0}, "selection.drift_steps=0 is too small: use 1 or more"),
    "drift below": ({"selection__drift_bound": -0.1}, "selection.drift_bound=-0.1 is too small: use 0 or more"),
    "first stage without pipeline": (
        {"parallel__first_stage_layers": 2},
        "parallel.first_stage_layers=2 needs parallel.pipeline > 1, which is 1: leave it out",
    ),
    "empty last stage": (
        {"parallel__pipeline": 2, "parallel__last_stage_layers": 0},
        "parallel.last_stage_layers=0 is too small: use 1 or more",
    ),
    "gradients in bf16 of weights in fp32": (
        {"optimizer__gradient_dtype": "bf16", "training__precision": "fp32"},
        "optimizer.gradient_dtype=bf16 is for weights in bf16, and training.precision=fp32 has them in fp32: use "
        "gradient_dtype=fp32, or training.precision=bf16",
    ),
    "moments in bf16 of weights in fp32": (
        {"optimizer__second_moment_dtype": "bf16", "training__precision": "fp32"},
        "optimizer.second_moment_dtype=bf16 is for weights in bf16, and training.precision=fp32 has them in fp32: use "
        "second_moment_dtype=fp32, or training.precision=bf16",
    ),
    "state outside of weights in fp32": (
        {"optimizer__offload_fraction": 0.5, "training__precision": "fp32"},
        "optimizer.offload_fraction=0.5 is for weights in bf16, and training.precision=fp32 has them in fp32: use "
        "offload_fraction=0, or training.precision=bf16",
    ),
    "moments in bf16 outside": (
        {"optimizer__first_moment_dtype": "bf16", "optimizer__offload_fraction": 1.0},
        "optimizer.first_moment_dtype=bf16 cannot go with optimizer.offload_fraction=1.0, which keeps moments in fp32: use "
        "one of them",
    ),
    "more than all of the state": (
        {"optimizer__offload_fraction": 2.0},
        "optimizer.offload_fraction=2.0 is outside [0, 1]: use a value in it",
    ),
    "activations outside, computed again": (
        {"training__offload_layers": 2, "training__recompute": "full"},
        "training.offload_layers=2 cannot go with training.recompute=full: use one of them",
    ),
    "activations of stages outside": (
        {"training__offload_layers": 2, "parallel__pipeline": 2},
        "training.offload_layers=2 needs parallel.pipeline=1, which is 2: use offload_layers=0",
    ),
    "activations of torch outside": (
        {"training__offload_layers": 2, "model__backend": "torch"},
        "training.offload_layers=2 is Transformer Engine's, and the layers of this run are torch's (model.backend, or "
        "training.precision=fp32): use offload_layers=0",
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
    "rule without threshold": (
        {"selection__rule": "threshold"},
        "selection.rule=threshold needs selection.threshold: set the lowest score to keep",
    ),
    "threshold without rule": (
        {"selection__threshold": 0.1},
        "selection.threshold=0.1 needs selection.rule=threshold: set it, or leave the threshold out",
    ),
    "threshold nan": (
        {"selection__rule": "threshold", "selection__threshold": math.nan},
        "selection.threshold=nan is no number: use a score",
    ),
    "threshold and rho": (
        {"selection__rule": "threshold", "selection__threshold": 0.1, "selection__rho": 0.5},
        "selection.rho=0.5 is not used by selection.rule=threshold: leave it out, or use rule=top",
    ),
    "threshold of no scores": (
        {"selection__rule": "threshold", "selection__threshold": 0.1, "selection__method": "full"},
        "selection.rule=threshold needs scores, and selection.method=full has none: use another method",
    ),
    "data set by scores of a step": (
        {"selection__scope": "dataset"},
        "selection.scope=dataset needs scores that are known before training, which those of selection.method=sstoken are "
        "not: use random or history_probability or cleaning or external, or scope=batch",
    ),
    "data set by moving history": (
        {
            "selection__scope": "dataset",
            "selection__method": "history_probability",
            "history__source": "adapters_off",
            "lora__rank": 4,
        },
        "selection.scope=dataset needs history losses before training, which history.source=adapters_off does not have: use "
        "frozen",
    ),
    "data set by an adaptive share": (
        {"selection__scope": "dataset", "selection__method": "random", "selection__rho": "auto"},
        "selection.rho=auto chooses for a global batch, not for selection.scope=dataset: use a number",
    ),
    "cleaning without reference": (
        {"selection__method": "cleaning"},
        "selection.method=cleaning needs history.reference_hf_path: name the folder of the reference model",
    ),
    "external without file": (
        {"selection__method": "external"},
        "selection.method=external needs selection.external: name a Parquet file",
    ),
    "file that nobody reads": (
        {"selection__external": "scores.parquet"},
        "selection.external=scores.parquet is not used: set selection.method=external or weights.method=external, or leave it "
        "out",
    ),
    "share of a given selection": (
        {"selection__method": "external", "selection__external": "records.parquet", "selection__rho": 0.5},
        "selection.rho=0.5 is not used by selection.method=external, which takes the tokens that are marked as selected: "
        "leave it out, or rank their score with selection.rule=top",
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
    "watched": (
        {"logging__watch": 3},
        "logging.watch=3 needs logging.directory (or checkpoint.directory): name one, or use 0",
    ),
    "watched below": (
        {"logging__watch": -1, "logging__directory": "logs"},
        "logging.watch=-1 is too small: use 0 or more",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule(name):
    changes, message = BROKEN[name]
    assert problems_of(settings_with(**changes)) == [message]


def test_unknown_history_source_is_told_the_known_ones():
    known = list(history_sources())
    assert known == sorted(known) and {"adapters_off", "frozen"} <= set(known)
    problem = f"history.source=yesterday is unknown: use one of {', '.join(known)}"
    assert problems_of(settings_with(history__source="yesterday")) == [problem]


def test_unknown_method_is_told_the_known_ones():
    (problem,) = problems_of(settings_with(selection__method="best"))
    assert problem.startswith("selection.method=best is unknown: use one of ")
    known = problem.split("use one of ")[1].split(", or ")[0].split(", ")
    assert {"sstoken", "full", "random"} <= set(known)
    for method in known:
        needs = find_method(method).needs
        more = {"history__reference_hf_path": "reference"} if "reference_loss" in needs else {}
        more |= {"selection__external": "records.parquet"} if "external" in needs else {}
        assert problems_of(settings_with(selection__method=method, **more)) == []


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
    {"selection__rho": "auto", "selection__method": "rho1"},
    {"selection__rule": "threshold", "selection__threshold": 0.1, "selection__method": "probability"},
    {"selection__rule": "threshold", "selection__threshold": -math.inf, "selection__scope": "dataset"},
    {"selection__rule": "top", "selection__rho": 0.3, "selection__scope": "batch"},
    {"selection__scope": "dataset", "selection__method": "full"},
    {"selection__scope": "dataset", "selection__method": "history_probability"},
    {
        "selection__method": "external",
        "selection__external": "a.parquet",
        "selection__rule": "top",
        "selection__rho": 0.3,
    },
    {"weights__method": "external", "selection__external": "weights.parquet"},
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
