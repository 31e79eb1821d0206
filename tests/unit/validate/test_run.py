"""Settings against model, data and number of processes: each cross-check, the plan's text, the dry run."""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megatron_sstoken.config import SettingsError
from megatron_sstoken.data.store import StoreWriter
from megatron_sstoken.train import main
from megatron_sstoken.training.loop import identity_of
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.layout import divisors
from megatron_sstoken.validate.run import plan_run
from tests.cli import settings_arguments
from tests.reference.hf_reference import Sample
from tests.toy import make_tokenizer
from tests.workbench import VOCABULARY, make_model, make_samples, make_settings, make_store

# `main` reads the settings with what jsonargparse 4.49 renamed; the old name goes with its version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NUM_SAMPLES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model` (4 layers, 4 heads, 2 groups, feed-forward 48, vocabulary 99, 512 positions) and `data`."""
    folder = tmp_path_factory.mktemp("plan")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES))
    return folder


@pytest.fixture
def settings(folder):
    return lambda **changes: make_settings(str(folder / "model"), str(folder / "data"), **changes)


def problems_of(settings, world_size: int = 1) -> list[str]:
    with pytest.raises(SettingsError) as error:
        plan_run(settings, world_size)
    return error.value.problems


def only_problem(settings, world_size: int = 1) -> str:
    (problem,) = problems_of(settings, world_size)
    return problem


def write_samples(folder: Path, samples: list[Sample], **changes) -> str:
    """A store of these samples with other facts in its manifest."""
    facts = {"vocabulary_size": VOCABULARY, "tokenizer_fingerprint": "toy", "tokenizer_path": "toy"} | changes
    writer = StoreWriter(folder)
    for row, sample in enumerate(samples):
        writer.add(np.array(sample.tokens, dtype=np.int32), np.array(sample.roles, dtype=np.uint8), 10 * row)
    writer.finalize(eos_token_id=1, template=None, **facts)
    return str(folder)


def test_a_plan(settings):
    plan = plan_run(settings(training__epochs=3), 4)
    assert (plan.num_packs, plan.num_steps, plan.world_size) == (60, 8, 4)
    assert (plan.shape.data_size, plan.shape.num_micro_batches, plan.shape.pack_multiple) == (4, 2, 64)
    assert plan.captured_layers == (4,) and plan.needs_history and plan.validation is None
    assert plan.train.order.num_packs(1) == NUM_SAMPLES


def test_rows_may_be_as_long_as_the_model_allows(settings):
    assert plan_run(settings(data__sequence_length=512), 1).settings.data.sequence_length == 512


def test_steps_replace_epochs(settings):
    plan = plan_run(settings(training__steps=7, training__epochs=3), 1)
    assert (plan.num_packs, plan.num_steps) == (56, 7)


def test_layers_are_counted_from_either_end(settings):
    assert plan_run(settings(selection__layer=-4), 1).captured_layers == (1,)
    assert plan_run(settings(selection__layer=0), 1).captured_layers == (1,)
    assert plan_run(settings(selection__layer=3), 1).captured_layers == (4,)
    assert plan_run(settings(selection__layer=[-1, 1]), 1).captured_layers == (2, 4)
    assert plan_run(settings(selection__layer=0, parallel__pipeline=2), 2).captured_layers == (1,)


@pytest.mark.parametrize(
    ("method", "history", "attention"),
    [("sstoken", True, (4,)), ("full", False, ()), ("random", False, ())],
)
def test_needs_of_methods(settings, method, history, attention):
    plan = plan_run(settings(selection__method=method), 1)
    assert plan.needs_history is history and plan.captured_layers == attention


@pytest.mark.parametrize(
    ("world_size", "parallel", "data_size", "pack_multiple", "sample_multiple"),
    [
        (4, {"parallel__tensor": 2}, 2, 64, 1),
        (
            4,
            {"parallel__tensor": 4, "parallel__sequence": True},
            1,
            64,
            1,
        ),  # the cut goes through query groups
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, 1, 64, 1),
        (8, {"parallel__tensor": 2, "parallel__pipeline": 2}, 2, 64, 1),
        (6, {"parallel__context": 3}, 2, 192, 6),
        (8, {"parallel__context": 2, "parallel__tensor": 2, "parallel__sequence": True}, 2, 64, 4),
    ],
)
def test_layouts_that_fit(settings, world_size, parallel, data_size, pack_multiple, sample_multiple):
    shape = plan_run(settings(**parallel), world_size).shape
    assert (shape.data_size, shape.pack_multiple, shape.sample_multiple) == (
        data_size,
        pack_multiple,
        sample_multiple,
    )


# name → changes, number of processes, the whole message ({model} and {data} are folders)
LAYOUT_PROBLEMS = {
    "processes": (
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        6,
        "6 processes cannot be split into parallel.tensor=2 × parallel.pipeline=2 × parallel.context=1 = 4: "
        "start a multiple of 4 processes, or use smaller sizes",
    ),
    "global batch": (
        {"training__global_batch_size": 10, "training__micro_batch_size": 2},
        4,
        "training.global_batch_size=10 is not a multiple of training.micro_batch_size=2 × data parallel size 4 = 8: "
        "use 8 or 16",
    ),
    "small global batch": (
        {"training__global_batch_size": 3},
        4,
        "training.global_batch_size=3 is not a multiple of training.micro_batch_size=1 × data parallel size 4 = 4: "
        "use 4",
    ),
    "interleaved batch": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "training__global_batch_size": 7},
        2,
        "training.global_batch_size=7 gives 7 micro-batches; the interleaved schedule needs a multiple of "
        "parallel.pipeline=2: use a multiple of 2",
    ),
    "layers": (
        {"parallel__pipeline": 3},
        3,
        "parallel.pipeline=3 × parallel.virtual_pipeline=1 = 3 does not divide model.num_hidden_layers=4: "
        "use a product of 1, 2 or 4",
    ),
    "layers and chunks": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3},
        2,
        "parallel.pipeline=2 × parallel.virtual_pipeline=3 = 6 does not divide model.num_hidden_layers=4: "
        "use a product of 1, 2 or 4",
    ),
    "length": (
        {"data__sequence_length": 513},
        1,
        "data.sequence_length=513 is longer than the model's max_position_embeddings=512: use 512 or less",
    ),
    "no such layer": (
        {"selection__layer": 4},
        1,
        "selection.layer=4 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "no such layer from the end": (
        {"selection__layer": -5},
        1,
        "selection.layer=-5 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "no such layer in a list": (
        {"selection__layer": [0, 7]},
        1,
        "selection.layer=7 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "a layer twice": (
        {"selection__layer": [3, -1]},
        1,
        "selection.layer=[3, -1] names a layer twice in a model of 4 layers: use each once",
    ),
    "no data": (
        {"data__train": "/nowhere/data"},
        1,
        "data.train: prepared data: /nowhere/data does not exist: make it with tools/prepare_data.py",
    ),
    "no validation data": (
        {"data__validation": "/nowhere/data"},
        1,
        "data.validation: prepared data: /nowhere/data does not exist: make it with tools/prepare_data.py",
    ),
    "no model": (
        {"model__hf_path": "/nowhere/model"},
        1,
        "model.hf_path: /nowhere/model has no config.json: name the folder of a Hugging Face checkpoint",
    ),
    "no checkpoint": (
        {"model__checkpoint": "/nowhere/step"},
        1,
        "model.checkpoint: /nowhere/step holds no complete checkpoint (a folder step_<number> with sstoken.json)",
    ),
    "no history model": (
        {"history__hf_path": "/nowhere/old"},
        1,
        "history.hf_path: /nowhere/old has no config.json: name the folder of a Hugging Face checkpoint",
    ),
}


@pytest.mark.parametrize("name", LAYOUT_PROBLEMS)
def test_what_does_not_fit(settings, name):
    changes, world_size, message = LAYOUT_PROBLEMS[name]
    assert problems_of(settings(**changes), world_size)[0] == message


@pytest.mark.parametrize(
    ("shape", "tensor", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 36},
            4,
            "parallel.tensor=4 does not divide model.num_attention_heads=6: use 1, 2, 3 or 6",
        ),
        (
            {"intermediate_size": 50},
            4,
            "parallel.tensor=4 does not divide model.intermediate_size=50: use 1, 2, 5, 10, 25 or 50",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48},
            6,
            "parallel.tensor=6 neither divides nor is a multiple of model.num_key_value_heads=4: use 1, 2 or 4",
        ),
    ],
)
def test_tensor_parallel_against_the_model(folder, tmp_path, shape, tensor, message):
    make_model(tmp_path / "model", **shape)
    settings = make_settings(str(tmp_path / "model"), str(folder / "data"), parallel__tensor=tensor)
    assert message in problems_of(settings, tensor)
    settings.parallel.tensor = 2
    assert plan_run(settings, 2).shape.data_size == 1


def test_divisors():
    assert (divisors(1), divisors(7), divisors(12)) == ("1", "1 or 7", "1, 2, 3, 4, 6 or 12")
    assert divisors(128) == "1, 2, 4, 8, 16, 32 or 64"


def test_settings_rules_come_first_and_alone(settings):
    problem = only_problem(settings(selection__rho=2.0, model__hf_path="/nowhere"))
    assert problem.startswith("selection.rho=2.0")


def test_many_problems_together(settings):
    found = problems_of(
        settings(
            data__train="/nowhere/data",
            data__sequence_length=1000,
            selection__layer=9,
            parallel__pipeline=3,
            training__global_batch_size=7,
            training__micro_batch_size=2,
            model__checkpoint="/nowhere/step",
        ),
        3,
    )
    starts = ("parallel.pipeline=3", "data.sequence_length=1000", "selection.layer=9", "data.train: ")
    starts += ("training.global_batch_size=7", "model.checkpoint: ")
    assert len(found) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(found, starts, strict=True)), found


def test_unsupported_model(settings, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    problem = only_problem(settings(model__hf_path=str(tmp_path / "model")))
    assert problem.startswith("model.hf_path: ") and "model_type='mamba'" in problem


def test_damaged_weights(settings, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    problem = only_problem(settings(model__hf_path=str(tmp_path / "model")))
    assert problem.startswith(f"model.hf_path: {weights} is not a readable safetensors file")
    weights.unlink()
    problem = only_problem(settings(model__hf_path=str(tmp_path / "model")))
    assert "has neither model.safetensors nor model.safetensors.index.json" in problem
    # as history the same folder is as bad, unless nobody asks for history
    problem = only_problem(settings(history__hf_path=str(tmp_path / "model")))
    assert problem.startswith("history.hf_path: ") and "has neither" in problem
    assert plan_run(settings(history__hf_path=str(tmp_path / "model"), selection__method="full"), 1)


def test_samples_without_response(settings, tmp_path):
    samples = make_samples(4)
    silent = [Sample(sample.tokens, [0] * len(sample.roles)) for sample in samples[1:3]]
    data = write_samples(tmp_path / "data", [samples[0], *silent, samples[3]])
    for setting in ("data.train", "data.validation"):
        assert only_problem(settings(**{setting: data})) == (
            f"{setting}={data}: 2 samples have no response token (first: input row 10): "
            "prepare the data again with tools/prepare_data.py"
        )


def test_data_of_a_larger_vocabulary(settings, folder, tmp_path):
    data = write_samples(tmp_path / "data", make_samples(3), vocabulary_size=VOCABULARY + 1)
    assert only_problem(settings(data__train=data)) == (
        f"data.train={data} was prepared with a vocabulary of 100, model.hf_path={folder / 'model'} has 99: "
        "prepare the data with the model's tokenizer"
    )
    smaller = write_samples(tmp_path / "smaller", [Sample([1, 2, 3], [0, 0, 1])], vocabulary_size=50)
    assert plan_run(settings(data__train=smaller), 1).num_packs == 1


def test_tokenizer_beside_the_model(settings, folder, tmp_path):
    from megatron_sstoken.data.tokenizer import load_tokenizer

    shutil.copytree(folder / "model", tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    model = str(tmp_path / "model")
    assert only_problem(settings(model__hf_path=model)) == (
        f"data.train={folder / 'data'} was prepared with another tokenizer (toy) than the one of "
        f"model.hf_path={model}: prepare the data with --tokenizer {model}"
    )
    fingerprint = load_tokenizer(model).fingerprint
    data = write_samples(tmp_path / "data", make_samples(3), tokenizer_fingerprint=fingerprint)
    assert plan_run(settings(model__hf_path=model, data__train=data), 1).num_packs == 3


def test_validation_of_another_tokenizer(settings, folder, tmp_path):
    data = write_samples(tmp_path / "data", make_samples(3), tokenizer_fingerprint="other")
    assert only_problem(settings(data__validation=data)) == (
        f"data.validation={data} was prepared with another tokenizer than data.train={folder / 'data'}: "
        "prepare both with the same"
    )
    assert len(plan_run(settings(data__validation=str(folder / "data")), 1).validation.store) == NUM_SAMPLES


def test_no_sample_is_left(settings, folder):
    problem = only_problem(settings(data__sequence_length=4, data__too_long="drop"))
    assert problem.startswith(f"data.train: {folder / 'data'}: no sample is left with data.sequence_length=4")


def test_history_model_of_another_vocabulary(settings, tmp_path):
    history = make_model(tmp_path / "history", vocab_size=98)
    problem = only_problem(settings(history__hf_path=history))
    assert f"was prepared with a vocabulary of 99, history.hf_path={history} has 98" in problem
    larger = make_model(tmp_path / "larger", vocab_size=128)  # padded, as one tokenizer's models of several sizes are
    plan_run(settings(history__hf_path=larger), 1)


@pytest.mark.parametrize(
    ("shape", "parallel", "named"),
    [
        ({"num_hidden_layers": 3}, {"parallel__pipeline": 2}, "num_hidden_layers=3"),
        ({"intermediate_size": 49}, {"parallel__tensor": 2}, "intermediate_size=49"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48},
            {"parallel__tensor": 2},
            "num_key_value_heads=3",
        ),
    ],
)
def test_history_model_that_the_layout_does_not_divide(settings, tmp_path, shape, parallel, named):
    history = make_model(tmp_path / "history", **shape)
    assert f"history.{named}: use" in only_problem(settings(history__hf_path=history, **parallel), 2)
    plan_run(settings(history__hf_path=history), 1)


def test_history_model_that_is_too_short(settings, tmp_path):
    history = make_model(tmp_path / "history", max_position_embeddings=64)
    problem = only_problem(settings(history__hf_path=history))
    assert problem.endswith("is longer than the history model's max_position_embeddings=64: use 64 or less")


def test_weights_that_lack_a_layer(settings, tmp_path, folder):
    path = tmp_path / "model"
    shutil.copytree(folder / "model", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert "model.layers.4.input_layernorm.weight is missing" in only_problem(settings(model__hf_path=str(path)))


def test_numbers_that_cannot_be(settings):
    assert only_problem(settings(training__seed=-1)) == "training.seed=-1 is too small: use 0 or more"
    with pytest.raises(SettingsError, match="world_size=-2 is too small"):
        plan_run(settings(), -2)


CONVERSION = '{"step": 2, "identity": null, "hf_path": "", "split": [1, 1, 1, "cpu"]}'


def test_a_start_that_moves_is_refused(settings, tmp_path):
    (tmp_path / "step_0000002").mkdir()
    (tmp_path / "step_0000002" / "sstoken.json").write_text(CONVERSION)
    run = settings(checkpoint__directory=str(tmp_path), model__checkpoint=str(tmp_path))
    assert "is checkpoint.directory: the start would move" in only_problem(run)
    plan_run(settings(checkpoint__directory=str(tmp_path), model__checkpoint=str(tmp_path / "step_0000002")), 1)


@pytest.mark.parametrize("setting", ["checkpoint.directory", "logging.directory"])
def test_folders_that_cannot_be_made(settings, tmp_path, setting):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "run"
    assert only_problem(settings(**{setting: str(path)})) == (
        f"{setting}={path} cannot be written: {tmp_path / 'file'} is not a writable folder"
    )
    assert plan_run(settings(**{setting: str(tmp_path / "new" / "run")}), 1)
    assert not (tmp_path / "new").exists(), "planning writes nothing"


def facts_of(text: str) -> dict[str, str]:
    """Name → value of each line of a described plan."""
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_description(settings, folder):
    changes = {"training__micro_batch_size": 2, "training__epochs": 2, "parallel__tensor": 2}
    samples = make_samples(NUM_SAMPLES)
    lengths = [min(len(sample.tokens), 50) for sample in samples]
    long = sum(len(sample.tokens) > 50 for sample in samples)
    assert 0 < long < NUM_SAMPLES
    facts = facts_of(describe(plan_run(settings(data__sequence_length=50, **changes), 4)))
    assert facts["model"].startswith("llama, 37,344 parameters, 4 layers")
    assert facts["vocabulary"] == "99, padded to 128"
    assert facts["processes"] == "4 = tensor 2 × pipeline 1 × context 1 × data 2"
    assert facts["data"] == (
        f"20 samples, {sum(lengths):,} tokens, longest 50 ({long} truncated, 0 dropped, 0 left without response)"
    )
    mean = sum(lengths) / NUM_SAMPLES
    assert facts["batch"] == (
        f"8 packs = micro-batch 2 × data 2 × accumulation 2; about {math.ceil(mean * 8)} real tokens a step"
    )
    assert facts["packs"] == "20 of up to 50 tokens an epoch, one sample each, padded to the longest of its batch"
    assert facts["steps"] == "5 (2 epochs)"
    assert facts["selection"] == (
        "sstoken, rho 0.6, scope sample, loss averaged by token, gamma 0.5, layer -1, history frozen (starting weights)"
    )
    assert facts["precision"] == "fp32" and facts["checkpoints"] == "none"


def test_description_of_other_runs(settings, folder):
    plan = plan_run(
        settings(
            parallel__pipeline=2,
            parallel__virtual_pipeline=2,
            parallel__tensor=2,
            parallel__sequence=True,
            training__steps=5,
            selection__method="full",
            checkpoint__directory="runs/1",
        ),
        4,
    )
    facts = facts_of(describe(plan))
    assert facts["processes"] == ("4 = tensor 2 × pipeline 2 (× 2 chunks) × context 1 × data 1, sequence parallel")
    assert facts["steps"] == "5 (2 epochs)" and facts["checkpoints"] == "runs/1"
    assert facts["selection"] == "full: every response token"
    random = plan_run(settings(selection__method="random", selection__rho=0.25), 1)
    assert facts_of(describe(random))["selection"] == "random, rho 0.25, scope sample, loss averaged by token"


def test_packing_of_a_plan(settings):
    """Rows are counted as the batches will hold them; the arithmetic is of packed rows."""
    plan = plan_run(settings(data__packing=True, training__epochs=2, training__global_batch_size=2), 1)
    tokens = sum(len(sample.tokens) for sample in make_samples(NUM_SAMPLES))
    rows = plan.train.order.num_packs(1)
    assert tokens / 128 <= rows < NUM_SAMPLES / 2 and plan.num_packs == plan.train.order.num_packs(2)
    assert plan.num_steps == math.ceil(plan.num_packs / 2)
    facts = facts_of(describe(plan))
    assert facts["packs"] == (
        f"{rows} of up to 128 tokens an epoch, packed {NUM_SAMPLES / rows:.1f} samples each, "
        f"{100 * tokens / rows / 128:.1f} % full"
    )
    assert facts["batch"].endswith(f"about {math.ceil(tokens / rows * 2)} real tokens a step")


def dry_run(settings, *options: str) -> int:
    return main([*settings_arguments(settings), "--dry_run", *options])


def test_dry_run_prints_the_plan_and_makes_nothing(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path / "run"), parallel__tensor=2)
    assert dry_run(run, "--world_size=8") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == describe(plan_run(run, 8)) and "data 4" in printed.out
    assert printed.err == "" and not (tmp_path / "run").exists()


def test_dry_run_counts_the_processes_of_torchrun(settings, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert dry_run(settings()) == 0
    assert "4 = tensor 1 × pipeline 1 × context 1 × data 4" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert dry_run(settings()) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_tells_all_problems_once(settings, monkeypatch, capsys):
    run = settings(data__sequence_length=1000, selection__layer=9)
    assert dry_run(run, "--world_size=1") == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert printed.out == "" and lines == [f"error: {problem}" for problem in problems_of(run)] and len(lines) == 2
    monkeypatch.setenv("RANK", "1")
    assert dry_run(run, "--world_size=1") == 2
    assert capsys.readouterr() == ("", "")


def test_dry_run_of_a_resumable_run(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path))
    state = {"step": 3, "identity": asdict(identity_of(plan_run(run, 1))), "hf_path": "model", "num_rows": 80}
    newest = tmp_path / "step_0000003"
    for name, content in (
        (newest.name, state),
        ("step_0000002", state | {"step": 2}),
        ("step_0000004", None),
    ):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "sstoken.json").write_text(json.dumps(content))
    assert dry_run(run, "--world_size=1") == 0
    assert capsys.readouterr().out.endswith(f"would resume from {newest}\n")
    (newest / "sstoken.json").write_text(json.dumps(state | {"num_rows": 20}))
    run.training.steps = 9
    assert dry_run(run, "--world_size=1") == 2
    assert "its run of 20 packs ended with a batch that is not full" in capsys.readouterr().err
    (newest / "sstoken.json").write_text(json.dumps(state))
    run.training.seed = 5
    assert dry_run(run, "--world_size=1") == 2
    assert f"error: cannot resume from {newest}: it was made with training.seed=1234, now 5" in capsys.readouterr().err
    run.checkpoint.resume = False
    assert dry_run(run, "--world_size=1") == 2
    assert "holds checkpoints of another run (step 3)" in capsys.readouterr().err


def test_model_checkpoint_below_a_folder(settings, tmp_path):
    os.makedirs(tmp_path / "step_0000012")
    problem = only_problem(settings(model__checkpoint=str(tmp_path)))
    assert problem.startswith(f"model.checkpoint: {tmp_path} holds no complete checkpoint")
    (tmp_path / "step_0000012" / "sstoken.json").write_text("{}")
    assert "does not describe a checkpoint" in only_problem(settings(model__checkpoint=str(tmp_path)))
    (tmp_path / "step_0000012" / "sstoken.json").write_text(CONVERSION)
    assert plan_run(settings(model__checkpoint=str(tmp_path)), 1)


@pytest.fixture(scope="module")
def mixture(folder) -> str:
    """Another `mixture` of 4 experts a layer, same vocabulary."""
    return make_model(folder / "mixture", "mixtral")


@pytest.mark.parametrize(
    ("world_size", "parallel", "message"),
    [
        (
            2,
            {"parallel__expert": 3},
            "parallel.expert=3 does not divide the 2 processes of a pipeline stage: use 1 or 2",
        ),
        (6, {"parallel__expert": 3}, "parallel.expert=3 does not divide model.num_experts=4: use 1, 2 or 4"),
        (
            2,
            {"parallel__tensor": 2},
            "parallel.sequence=false with parallel.tensor=2 would compute the experts of every token 2 times: "
            "use parallel.sequence=true",
        ),
    ],
)
def test_experts_must_be_dealt_out_evenly(settings, mixture, world_size, parallel, message):
    problems = problems_of(settings(model__hf_path=mixture, training__global_batch_size=12, **parallel), world_size)
    assert message in problems


def test_experts_over_all_the_processes_of_a_stage(settings, mixture):
    split = {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2, "parallel__expert": 4}
    plan = plan_run(settings(model__hf_path=mixture, **split), 8)
    assert (plan.shape.data_size, plan.architecture.num_experts) == (2, 4)


def test_a_dense_model_has_no_experts(settings):
    assert only_problem(settings(parallel__expert=2), 2) == (
        "parallel.expert=2 needs a mixture of experts, which model.model_type=llama is not: use 1"
    )


def test_adapters_settings_that_cannot_work(settings):
    wrong = settings(
        history__source="adapters_off", history__store="x", lora__targets=[], lora__dropout=1.0, lora__alpha=0.0
    )
    with pytest.raises(SettingsError) as caught:
        plan_run(wrong, 1)
    assert caught.value.problems == [
        "lora.alpha=0.0 must be above 0: use the rank, or twice it",
        "lora.dropout=1.0 is outside [0, 1): use 0 for none",
        "lora.targets=[] names no linear: leave it out for all, or use lora.rank=0",
        "history.source=adapters_off needs lora.rank > 0, which is 0: set it, or use history.source=frozen",
        "history.store=x is not used by history.source=adapters_off: leave it out, or use source=frozen",
    ]
