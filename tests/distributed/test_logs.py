"""What a run leaves for people: losses per source, `metrics.jsonl`, and a folder that explains itself."""

import json
import shutil

import numpy as np
import pytest
import yaml

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.data.store import SampleStore, StoreWriter
from megatron_sstoken.files import read_json
from megatron_sstoken.folders import RUN_FILE, SETTINGS_FILE
from megatron_sstoken.training.metrics_file import read_metrics
from megatron_sstoken.training.records import read_records
from tests.helpers.cli import scalars
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import VOCABULARY, make_model, make_samples, make_settings

STEPS, LABELS = 2, ("maths", "chat", "code")
LAYOUTS = {
    "dp2": (2, {}),
    "pp2": (2, {"parallel__pipeline": 2}),
}


def labelled_store(folder, samples, labels):
    with StoreWriter(folder) as writer:
        for row, (sample, label) in enumerate(zip(samples, labels, strict=True)):
            tokens, roles = np.array(sample.tokens, dtype=np.int32), np.array(sample.roles, dtype=np.uint8)
            writer.add(tokens, roles, row, label=label)
        writer.finalize(
            vocabulary_size=VOCABULARY, eos_token_id=1, tokenizer_fingerprint="toy", tokenizer_path="toy", template=None
        )
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    make_model(folder / "model")
    samples = make_samples(8 * STEPS, seed=5, longest=30)
    labelled_store(folder / "data", samples, [LABELS[number % 5 % 3] for number in range(len(samples))])
    labelled_store(folder / "validation", samples[:5], ["chat", "maths", "chat", "chat", "maths"])
    return folder


def settings_in(folder, directory, **changes):
    values = {
        "training__steps": STEPS,
        "training__micro_batch_size": 2,
        "selection__method": "attention",
        "data__validation": str(folder / "validation"),
        "checkpoint__directory": str(directory),
        "checkpoint__keep": 0,
        "checkpoint__save_every": 1,
        "logging__records_every": 1,
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def run(rank, settings):
    """Train as the program does."""
    from megatron_sstoken import train

    train.run(settings)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The same run on every layout."""
    place = tmp_path_factory.mktemp("runs")
    for name, (num_ranks, layout) in LAYOUTS.items():
        run_distributed(run, num_ranks, settings_in(folder, place / name, **layout))
    return place


def test_losses_of_sources(folder, runs):
    """Those of the records of each step, on every layout."""
    store = SampleStore(folder / "data")
    lines = {name: read_metrics(runs / name / "logs" / "metrics.jsonl") for name in LAYOUTS}
    for name in LAYOUTS:
        for step in range(1, STEPS + 1):
            records = read_records(runs / name / "logs" / "records" / f"step_{step:07d}.parquet")
            response = (records["role"] == 1) & (records["position"] > 0)
            labels = np.array([store.manifest.labels[store.labels[sample]] for sample in records["sample"]])
            assert {*labels} == {*LABELS}
            for label in LABELS:
                wanted = records["loss"][response & (labels == label)].astype(np.float64).mean()
                found = lines[name][step][f"loss/source/{label}"]
                assert found == pytest.approx(wanted, rel=1e-6)
                assert found == pytest.approx(lines["dp2"][step][f"loss/source/{label}"], rel=1e-5)
    last = lines["dp2"][STEPS]
    tag = scalars(runs / "dp2" / "logs", "loss/source/maths")
    assert tag[STEPS] == pytest.approx(last["loss/source/maths"], rel=1e-6)


def test_validation_before_the_first_step_and_of_each_source(folder, runs):
    store = SampleStore(folder / "validation")
    counts = {name: store.response_counts[store.labels == n].sum() for n, name in enumerate(store.manifest.labels)}
    other = read_metrics(runs / "dp2" / "logs" / "metrics.jsonl")
    for name in LAYOUTS:
        lines = read_metrics(runs / name / "logs" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 1, 2]
        for step in (0, STEPS):
            of_sources = [lines[step][f"loss/validation/{label}"] for label in counts]
            assert lines[step]["loss/validation"] == pytest.approx(
                np.average(of_sources, weights=[*counts.values()]), rel=1e-9
            )
            assert of_sources == pytest.approx([other[step][f"loss/validation/{label}"] for label in counts], rel=1e-5)
        assert "loss/validation" not in lines[1] and lines[0]["loss/validation"] != lines[STEPS]["loss/validation"]


def test_a_run_folder_explains_itself(folder, runs):
    for name, (num_ranks, _) in LAYOUTS.items():
        directory = runs / name
        content = read_json(directory / RUN_FILE)
        (start,) = content["starts"]
        assert content["format"] == 1 and start["ended"] == "done"
        assert (start["from_step"], start["to_step"], start["processes"]) == (0, STEPS, num_ranks)
        assert start["start"] <= start["end"] and start["versions"]["device"] == "cpu"
        assert start["data"]["train_fingerprint"] == SampleStore(folder / "data").manifest.data_fingerprint
        assert start["settings"]["selection"]["method"] == "attention"
        step = directory / f"step_{STEPS:07d}"
        (then,) = read_json(step / RUN_FILE)["starts"]
        assert then == start | {"end": None, "ended": None}
        assert (step / SETTINGS_FILE).read_bytes() == (directory / SETTINGS_FILE).read_bytes()
    again, _ = parse_settings(["--config", str(runs / "dp2" / SETTINGS_FILE)], program="", description="")
    assert again == settings_in(folder, runs / "dp2")
    assert yaml.safe_load((runs / "dp2" / SETTINGS_FILE).read_text())["training"]["steps"] == STEPS


def test_a_resumed_run_goes_on_with_its_lines_and_starts(folder, runs, tmp_path):
    directory = shutil.copytree(runs / "dp2", tmp_path / "run")
    before = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    run_distributed(run, 2, settings_in(folder, directory, checkpoint__resume=1))
    after = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in after] == [0, 1, 2]
    assert after[:2] == before[:2] and after[2] != before[2], "times differ"
    assert json.loads(after[2])["loss/all"] == json.loads(before[2])["loss/all"]
    starts = read_json(directory / RUN_FILE)["starts"]
    assert [(one["from_step"], one["to_step"], one["ended"]) for one in starts] == [(0, 2, "done"), (1, 2, "done")]
