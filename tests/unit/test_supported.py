"""What is supported stands in one place: who asks for it gets the same answer."""

import re
from typing import get_type_hints

import pytest
import torch

from megatron_sstoken import supported
from megatron_sstoken.config import Settings, TrainingSettings
from megatron_sstoken.doctor import Machine, fp8_recipes
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
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'"te": ["{supported.TRANSFORMER_ENGINE_REQUIREMENT}"]' in setup
    assert f'"megatron-core=={supported.MEGATRON_CORE}"' in setup
    assert f"megatron-core=={supported.MEGATRON_CORE}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_every_recipe_of_the_settings_has_its_tile():
    assert set(get_type_hints(TrainingSettings)["fp8_recipe"].__args__) == set(supported.TOKEN_MULTIPLE)


def test_it_imports_nothing():
    text = (ROOT / "megatron_sstoken" / "supported.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from)\s", text, re.MULTILINE)
