"""What stands on top of the page: the run in a few facts, each with its meaning, as far as its folder tells."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_sstoken.report.facts import SCORES, WORDS, facts, num_samples
from megatron_sstoken.report.runs import Run
from tests.helpers.report_example import example

SELECTION = {"rho": 0.6, "gamma": 0.3, "layer": -1, "scope": "sample", "rel_floor": 0.001, "drift_bound": 0.2}


def run(method="sstoken", model=None, selection=None, history=None):
    settings = {
        "selection": SELECTION | {"method": method, "drift_steps": 20, "on_drift": "warn"} | (selection or {}),
        "history": {"source": "frozen", "every": 100, "decay": 0.999} | (history or {}),
        "training": {"steps": 30, "global_batch_size": 4, "seed": 7},
        "model": {"hf_path": model},
    }
    return Run("run", Path("run"), Path("run"), settings, curves={"loss/all": [(1, 2.0), (20, 1.0)]})


def values(run, *numbers):
    found = facts(run, *(numbers or (None, None)))
    assert all(one["meaning"] for one in found)
    return {one["name"]: one["value"] for one in found}


def write_model(folder, layers=30, names=("model.safetensors",)):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    for name in names:
        save_file({name: np.zeros((1000, 1500), dtype=np.float16)}, folder / name)
    return str(folder)


def test_the_run_in_facts(tmp_path):
    found = values(run(model=write_model(tmp_path / "smol")), 400, 40)
    of_folder = f"{tmp_path.name}/smol"
    assert {name: value for name, value in found.items() if value is not None} == {
        "Model": f"{of_folder}, 30 layers, 1.5 M parameters",
        "Training": "400 samples, 20 steps of 4",
        "Validation": "40 samples",
        "Seed": "7",
        "Method": "sstoken",
        "Score": "0.3 · rel_norm + 0.7 · attention",
        "ρ": "0.6 of each sample",
        "γ": "0.3",
        "Attention": "last of 30 layers",
        "History": "frozen: the starting weights, which stay as they are",
        "Drift bound": "0.2 nats",
    }
    assert WORDS.keys() <= found.keys() and "rel_floor = 0.001 nats" in str(facts(run(), None, None))


def test_files_of_weights_that_belong_to_the_model_are_counted_and_no_others(tmp_path):
    folder = write_model(tmp_path / "model", names=("a.safetensors", "b.safetensors", "adapter.safetensors"))
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert values(run(model=folder))["Model"].endswith("30 layers, 3 M parameters")


def test_what_is_gone_is_left_out(tmp_path):
    found = values(run(model=str(tmp_path / "gone")))
    assert found["Model"] == f"{tmp_path.name}/gone" and found["Attention"] == "last layer"
    assert "Validation" not in found and found["Training"] == "20 steps of 4"
    assert values(None).keys() == WORDS.keys()
    assert num_samples(run(), "validation") is None
    other = run()
    other.settings["data"] = {"validation": str(tmp_path / "gone")}
    assert num_samples(other, "validation") is None


@pytest.mark.parametrize("method", [*SCORES, "full", "my.own"])
def test_other_methods_have_no_settings_that_they_do_not_read(method):
    found = values(run(method))
    assert (
        "γ" not in found
        and ("Score" in found) == (method != "full")
        and ("Attention" in found) == (method == "attention")
    )
    assert (
        ("History" in found)
        == ("Drift bound" in found)
        == (method in ("rel", "rho1", "history_probability", "cleaning", "my.own"))
    )


@pytest.mark.parametrize(
    ("selection", "history", "name", "value"),
    [
        ({"rho": "auto", "rho_min": 0.3, "rho_max": 0.9, "scope": "batch"}, {}, "ρ", "auto, 0.3 to 0.9, of each batch"),
        ({"rule": "threshold", "threshold": 0.4}, {}, "Threshold", "0.4"),
        ({"layer": [0, -1]}, {}, "Attention", "layers 0, 29 of 30, counted from 0"),
        ({}, {"source": "snapshot"}, "History", "snapshot: a copy of the weights, renewed every 100 steps"),
        ({}, {"hf_path": "models/base"}, "History", "the weights of base"),
    ],
)
def test_variants(tmp_path, selection, history, name, value):
    model = write_model(tmp_path / "model")
    assert values(run(model=model, selection=selection, history=history))[name] == value


def test_words_of_the_example_are_those_of_the_page():
    assert {one["name"] for one in example()["facts"]} >= WORDS.keys()
