"""Settings against model, data and number of processes: the plan, and each cross-check."""

import json
import os
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sstoken.config import SettingsError
from megatron_sstoken.data.external import DATA_KEY
from megatron_sstoken.model.lora_places import describe_trained
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from tests.helpers.plans import NUM_SAMPLES, only_problem, problems_of, write_samples
from tests.helpers.toy import make_tokenizer
from tests.helpers.workbench import VOCABULARY, make_model, make_samples, make_store
from tests.reference.hf_reference import Sample


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


def test_captured_layers_have_attention(settings, tmp_path):
    model = make_model(tmp_path / "model", "qwen3_5_text")
    assert plan_run(settings(model__hf_path=model, selection__layer=[0, -1]), 1).captured_layers == (1, 4)
    assert only_problem(settings(model__hf_path=model, selection__layer=[3, 1, -2])) == (
        "selection.layer=[3, 1, -2] names layers without attention (1, 2), in place of which model.model_type=qwen3_5_text has "
        "gated delta nets there: use some of 0, 3"
    )
    assert (
        plan_run(settings(model__hf_path=model, selection__layer=1, selection__method="full"), 1).captured_layers == ()
    )
    none = make_model(tmp_path / "none", "qwen3_5_text", layer_types=["linear_attention"] * 4)
    assert only_problem(settings(model__hf_path=none)).endswith(
        "use another selection.method than sstoken, which captures attention"
    )


def test_selective_recomputation_saves_nothing_of_fused_attention(settings, tmp_path):
    """A note says so; but much of delta nets, of which a note says that."""
    model = make_model(tmp_path / "model", "qwen3_5_text")

    def told(start, recompute, **more):
        changes = {"training__recompute": recompute, "training__precision": "bf16"} | more
        notes = plan_run(settings(**changes), 1, dry_run=True).notes
        return any(note.startswith(f"training.recompute={start}") for note in notes)

    fused, kept = "selective computes attention again and saves", "none keeps all that gated delta nets compute"
    assert told(fused, "selective") and not told(fused, "selective", model__hf_path=model)
    assert told(kept, "none", model__hf_path=model) and not told(kept, "none")


@pytest.mark.parametrize(
    ("method", "history", "attention"),
    [("sstoken", True, (4,)), ("full", False, ()), ("random", False, ())],
)
def test_needs_of_methods(settings, method, history, attention):
    plan = plan_run(settings(selection__method=method), 1)
    assert plan.needs_history is history and plan.captured_layers == attention


def test_external_files(settings, folder, tmp_path):
    """What of them a run reads follows from the settings; what they must have is asked for before it starts."""
    path = str(tmp_path / "records.parquet")
    table = {"sample": [0], "position": [1], "selected": [True]}
    given = {"selection__method": "external", "selection__external": path}
    assert only_problem(settings(**given)).startswith(f"selection.external: {path} does not exist: name a Parquet file")
    pq.write_table(pa.table(table), path)
    plan = plan_run(settings(**given), 1)
    assert plan.external_values == {"selected"} and not plan.ranks_all_data and not plan.needs_history
    assert f"external, the tokens that {path} marks as selected, loss averaged" in describe(plan)
    assert only_problem(settings(**given, selection__rule="top")) == (
        f"selection.external={path} has no column score: name a file that has it"
    )
    weights = {"selection__method": "full", "selection__external": path, "weights__method": "external"}
    assert only_problem(settings(**weights)).startswith("weights.method=external needs weights in data.train=")
    pq.write_table(pa.table({"sample": [0], "position": [1], "score": [0.5], "weight": [1.5]}), path)
    assert only_problem(settings(**given)) == (
        f"selection.external={path} has no column selected: rank its score with selection.rule=top or threshold"
    )
    plan = plan_run(settings(**weights), 1)
    assert plan.external_values == {"weight"} and plan.weighted
    assert f"external: those of {path}, divided by the number of selected tokens" in describe(plan)
    plan = plan_run(settings(**given, selection__rule="top", weights__method="external"), 1)
    assert plan.external_values == {"score", "weight"} and not plan.ranks_all_data
    assert f"external, rho 0.6, scope sample, loss averaged by token, scores of {path}" in describe(plan)
    other = pa.schema([("sample", pa.int64()), ("position", pa.int32()), ("selected", pa.bool_())])
    pq.write_table(pa.table(table, schema=other.with_metadata({DATA_KEY: "of others"})), path)
    assert only_problem(settings(**given)) == (
        f"selection.external: {path} is of other data than data.train (by its fingerprint): score this data, or name another"
    )


def test_rules_and_scopes_of_a_plan(settings, folder):
    """What becomes of scores, in the words of a dry run."""
    reference = {"selection__method": "cleaning", "history__reference_hf_path": str(folder / "model")}
    for changes, told, ranks_all in (
        ({**reference, "selection__scope": "dataset"}, "rho 0.6 of all data, chosen before training, loss", True),
        (
            {**reference},
            f"rho 0.6, scope sample, loss averaged by token, history frozen (starting weights), reference {folder}",
            False,
        ),
        (
            {"selection__method": "probability", "selection__rule": "threshold", "selection__threshold": 0.1},
            "probability, scores of 0.1 and above, loss",
            False,
        ),
    ):
        plan = plan_run(settings(**changes), 1)
        assert told in describe(plan) and plan.ranks_all_data is ranks_all


def test_a_reference_model_is_checked_as_the_history_is(settings, folder, tmp_path):
    changes = {"selection__method": "cleaning", "history__reference_hf_path": make_model(tmp_path / "m", vocab_size=90)}
    assert only_problem(settings(**changes)).endswith(
        f"history.reference_hf_path={tmp_path / 'm'} has 90: prepare the data with the model's tokenizer"
    )
    assert only_problem(settings(**changes | {"history__reference_hf_path": "/nowhere"})).startswith(
        "history.reference_hf_path: "
    )


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
    from megatron_sstoken.data.tokenizer_files import load_tokenizer

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


def test_texts_need_the_tokenizer_of_the_data(settings, folder, tmp_path):
    """Beside the model, or where it was when the data was prepared; without it, they are left out unless asked for."""
    from megatron_sstoken.data.tokenizer_files import load_tokenizer

    assert plan_run(settings(), 1)
    assert only_problem(settings(logging__record_text=True)) == (
        "logging.record_text=true: the tokenizer that the data was prepared with is not found: toy does not exist; "
        f"{folder / 'model'} holds none that can be read: put it there"
    )
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    data = write_samples(
        tmp_path / "data", make_samples(3), tokenizer_fingerprint=tokenizer.fingerprint, tokenizer_path=tokenizer.path
    )
    assert plan_run(settings(data__train=data, logging__record_text=True), 1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_does_not_switch_its_check_off(settings, tmp_path, name):
    model = make_model(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SettingsError, match=f"model.hf_path={model}: {name} is damaged .*: take another copy"):
        plan_run(settings(model__hf_path=model), 1)


def test_validation_of_another_tokenizer(settings, folder, tmp_path):
    data = write_samples(tmp_path / "data", make_samples(3), tokenizer_fingerprint="other")
    assert only_problem(settings(data__validation=data)) == (
        f"data.validation={data} was prepared with another tokenizer than data.train={folder / 'data'}: "
        "prepare both with the same"
    )
    assert len(plan_run(settings(data__validation=str(folder / "data")), 1).validation.store) == NUM_SAMPLES


def test_validation_of_another_template_is_told(settings, folder, tmp_path):
    data = write_samples(tmp_path / "data", make_samples(3), template="{{ messages }}", template_source="mine.jinja")
    (note,) = [note for note in plan_run(settings(data__validation=data), 1).notes if "chat template" in note]
    assert note.startswith(
        f"data.validation={data} was prepared with another chat template (mine.jinja) than data.train={folder / 'data'} "
    )
    same = plan_run(settings(data__validation=str(folder / "data")), 1).notes
    assert not any("chat template" in note for note in same)


def test_no_sample_is_left(settings, folder):
    problem = only_problem(settings(data__sequence_length=4, data__too_long="drop"))
    assert problem.startswith(f"data.train: {folder / 'data'}: no sample is left with data.sequence_length=4")


def test_history_model_of_another_vocabulary(settings, tmp_path):
    history = make_model(tmp_path / "history", vocab_size=98)
    problem = only_problem(settings(history__hf_path=history))
    assert f"was prepared with a vocabulary of 99, history.hf_path={history} has 98" in problem
    larger = make_model(tmp_path / "larger", vocab_size=128)  # padded, as one tokenizer's models of several sizes are
    plan_run(settings(history__hf_path=larger), 1)


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
    assert only_problem(settings(training__seed=-1)) == "training.seed=-1 is outside [0, 4294967295]: use a value in it"
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


def test_model_checkpoint_below_a_folder(settings, tmp_path):
    os.makedirs(tmp_path / "step_0000012")
    problem = only_problem(settings(model__checkpoint=str(tmp_path)))
    assert problem.startswith(f"model.checkpoint: {tmp_path} holds no complete checkpoint")
    (tmp_path / "step_0000012" / "sstoken.json").write_text("{}")
    assert "is damaged or of another version" in only_problem(settings(model__checkpoint=str(tmp_path)))
    (tmp_path / "step_0000012" / "sstoken.json").write_text(CONVERSION)
    assert plan_run(settings(model__checkpoint=str(tmp_path)), 1)


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
        "history.store=x is not used by history.source=adapters_off: leave it out, or use source=frozen or "
        "previous_visit",
    ]


def test_modules_trained_whole_that_cannot_be(settings, tmp_path):
    whole = {"lora__train_whole": ["lm_head"]}
    with pytest.raises(SettingsError) as caught:
        plan_run(settings(**whole, lora__rank=4, history__source="adapters_off"), 1)
    assert caught.value.problems == [
        "history.source=adapters_off needs the base as it was, of which lora.train_whole=['lm_head'] trains a part: use "
        "history.source=frozen"
    ]
    assert "lora.rank=0 trains all weights: leave it out" in only_problem(settings(**whole))
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    assert only_problem(settings(**whole, lora__rank=4, model__hf_path=tied)) == (
        "lora.train_whole=['lm_head'] parts embedding and head, which are one in this model (tie_word_embeddings): use "
        "[embed_tokens, lm_head], or neither"
    )
    one = settings(lora__rank=4, lora__targets=["q_proj", "embed_tokens"], model__hf_path=tied)
    assert any(
        note.endswith("alone, as in PEFT, and a merged model has a head of its own") for note in plan_run(one, 1).notes
    )
    both = settings(lora__rank=4, model__hf_path=tied, lora__train_whole=["embed_tokens", "lm_head"])
    assert describe_trained(plan_run(both, 1).architecture, both.lora).endswith(
        ", and 3,168 of embed_tokens and lm_head"
    )


def test_selective_recomputation_of_fused_attention_is_a_note(settings):
    def notes(**changes):
        plan = plan_run(settings(training__recompute="selective", **changes), 1, dry_run=True)
        return [note for note in plan.notes if "training.recompute=selective" in note]

    (note,) = notes(training__precision="bf16")
    assert note.endswith("use none, or full")
    assert notes(training__precision="bf16", model__backend="torch") == notes(training__precision="fp32") == []


def test_weights_of_the_data_are_used_unless_told_otherwise(settings, tmp_path):
    samples = make_samples(NUM_SAMPLES, longest=32)
    plain = make_store(tmp_path / "plain", samples)
    weighted = make_store(
        tmp_path / "weighted", [replace(one, weights=[role / 2 for role in one.roles]) for one in samples]
    )
    for method, wanted in ((None, True), ("external", True), ("none", False)):
        plan = plan_run(settings(data__train=weighted, weights__method=method), 1)
        assert plan.weighted == wanted, method
        assert ("ignored" in describe(plan)) == (method == "none")
    assert not plan_run(settings(data__train=plain), 1).weighted
    for data, told in (
        (plain, "power, alpha 0.3, divided"),
        (weighted, "power, alpha 0.3, times those of the data, divided"),
    ):
        plan = plan_run(settings(data__train=data, weights__method="power", weights__alpha=0.3), 1)
        assert plan.weighted == (data == weighted) and f"{told} by the number of selected tokens" in describe(plan)
    by_sum = plan_run(settings(data__train=plain, weights__method="deft", weights__divisor="weight"), 1)
    assert "deft, divided by their sum" in describe(by_sum)
    problem = only_problem(settings(data__train=plain, weights__method="external"))
    assert problem.startswith("weights.method=external needs weights in data.train=") and "use none" in problem


def test_the_head_tells_what_is_asked_for(settings):
    def signals(**changes):
        return plan_run(settings(**changes), 1).head_signals

    assert signals() == signals(weights__method="power") == ()
    assert signals(weights__method="deft") == ("sum_p2",)
    assert signals(weights__method="entropy", logging__entropy=True) == ("entropy", "top1", "entropy_top20")
