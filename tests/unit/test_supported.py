"""What is supported stands in one place: who asks for it gets the same answer."""

import re
import sys
from importlib import metadata
from typing import get_type_hints

import pytest
import torch
from packaging.markers import Marker

from megatron_sstoken import supported
from megatron_sstoken.commands.plan import CHOICES
from megatron_sstoken.config import ModelSettings, OptimizerSettings, SelectionSettings, Settings, TrainingSettings
from megatron_sstoken.doctor import REQUIRED, Machine, fp8_recipes
from megatron_sstoken.model import backend
from tests.helpers.cli import ROOT


@pytest.mark.parametrize("cuda", ["12.4", "12.9", "13.0"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_doctor_offers_the_recipes_that_a_run_takes(monkeypatch, capability, cuda):
    monkeypatch.setattr(backend, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    machine = Machine({}, [("a GPU", capability, 1)], cuda, imports={"transformer_engine.pytorch": ""})
    settings = Settings()
    settings.training.precision = "fp8"
    taken = []
    for recipe in supported.TOKEN_MULTIPLE:
        settings.training.fp8_recipe = recipe
        taken += [] if backend.machine_problems(settings) else [recipe]
    assert fp8_recipes(machine) == taken


def test_a_recipe_is_offered_only_if_every_gpu_computes_it():
    gpus = [("Hopper", (9, 0), 1), ("Blackwell of a workstation", (12, 0), 1), ("Blackwell", (10, 0), 1)]
    machine = Machine({}, gpus, "13.0", imports={"transformer_engine.pytorch": ""})
    assert fp8_recipes(machine) == ["delayed", "tensorwise", "blockwise"]


def test_setup_and_constraints_name_the_same_versions():
    required = metadata.requires("megatron-sstoken") or []
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in supported.LINES:
        assert line.megatron_core_requirement in required and line.megatron_core_requirement in pinned
    assert len([one for one in required + pinned if one.startswith("megatron-core")]) == 2 * len(supported.LINES)
    assert len([one for one in required if one.startswith("transformer-engine")]) == len(supported.LINES)


def test_the_doctor_looks_for_all_that_is_required():
    required = [re.match(r"[\w-]+", one)[0] for one in metadata.requires("megatron-sstoken") if "extra ==" not in one]
    assert sorted(set(required)) == sorted(REQUIRED)


def test_the_planner_chooses_among_what_the_settings_offer():
    sections = (TrainingSettings, ModelSettings, SelectionSettings, OptimizerSettings)
    offered = {name: hint for section in sections for name, hint in get_type_hints(section).items()}
    for name, choices in CHOICES.items():
        # A choice over all data costs a step what the scope sample does.
        assert set(choices) == set(offered[name].__args__) - {"dataset"}, name


def test_the_markers_part_all_pythons():
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        fits = [line for line in supported.LINES if Marker(line.python).evaluate({"python_version": python})]
        major, minor = map(int, python.split("."))
        assert fits == [supported.line_of(None, (major, minor))], python


def test_this_environment_has_the_line_of_its_python():
    installed = metadata.version("megatron-core")
    assert supported.line_of(installed, sys.version_info[:2]) == supported.line_of(None, sys.version_info[:2])
    assert installed in [line.megatron_core for line in supported.LINES]


def test_an_installed_version_counts_more_than_python():
    for line in supported.LINES:
        assert {supported.line_of(line.megatron_core, (3, minor)) for minor in (10, 11, 12, 13)} == {line}
    assert supported.line_of("0.17.0", (3, 11)) == supported.LINES[0]
    assert supported.line_of("0.17.0", (3, 13)) == supported.LINES[1]


def test_every_recipe_of_the_settings_has_its_tile():
    assert set(get_type_hints(TrainingSettings)["fp8_recipe"].__args__) == set(supported.TOKEN_MULTIPLE)


def test_it_needs_nothing():
    text = (ROOT / "megatron_sstoken" / "supported.py").read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:import|from)\s+(\S+)", text, re.MULTILINE) == ["typing"]
