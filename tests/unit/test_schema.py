"""The JSON schema that editors check YAML files by: every setting is in it, and it accepts what the parser accepts."""

import dataclasses
import json
from typing import Any

import pytest
import yaml

from megatron_sstoken import train
from megatron_sstoken.config import Settings
from megatron_sstoken.config.schema import schema
from tests.helpers.cli import ROOT

CONFIGS = sorted((ROOT / "pretrain_scripts" / "configs").glob("*.yaml"))


def faults(value: Any, rule: dict[str, Any], path: str = "") -> list[str]:
    """Where a value breaks a rule: what this schema uses of JSON Schema, and an error for all else."""
    left = {key: one for key, one in rule.items() if key not in ("description", "default", "title", "$schema")}
    found = []
    if kinds := left.pop("anyOf", None):
        found += [] if any(not faults(value, one) for one in kinds) else [f"{path}: {value!r} is none of {kinds}"]
    if "const" in left and value != left.pop("const"):
        found.append(f"{path}: {value!r} is another word")
    if "enum" in rule and value not in left.pop("enum"):
        found.append(f"{path}: {value!r} is none of {rule['enum']}")
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}
    if "type" in left:
        names = left.pop("type")
        names = [names] if isinstance(names, str) else names
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = [is_number if name == "number" else isinstance(value, types[name]) for name in names]
        fits = [
            fit and not (name == "integer" and isinstance(value, bool)) for name, fit in zip(names, fits, strict=True)
        ]
        found += [] if any(fits) else [f"{path}: {value!r} is no {names}"]
    items, properties, more = (left.pop(key, None) for key in ("items", "properties", "additionalProperties"))
    assert not left and more in (None, False), f"{path}: the schema says {left}"
    if items and isinstance(value, list):
        found += [fault for one in value for fault in faults(one, items, f"{path}[]")]
    if properties is not None and isinstance(value, dict):
        found += [f"{path}.{name} is unknown" for name in value if name not in properties]
        found += [
            fault
            for name in value
            if name in properties
            for fault in faults(value[name], properties[name], f"{path}.{name}")
        ]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_configurations_pass(path):
    assert faults(yaml.safe_load(path.read_text(encoding="utf-8")), schema()) == []


def test_every_setting_is_there_with_its_documentation_and_a_default_that_passes():
    sections = schema()["properties"]
    assert list(sections) == [field.name for field in dataclasses.fields(Settings)]
    for section, rule in sections.items():
        defaults = dataclasses.asdict(Settings())[section]
        assert list(rule["properties"]) == list(defaults)
        assert faults(defaults, rule, section) == []
        for name, one in rule["properties"].items():
            assert one["description"].strip() and one["default"] == defaults[name]


@pytest.mark.parametrize(
    "content",
    [
        {"selection": {"roh": 0.5}},
        {"rho": 0.5},
        {"selection": {"rho": "60%"}},
        {"training": {"precision": "fp16"}},
        {"training": {"steps": "two"}},
        {"training": {"seed": None}},
        {"lora": {"targets": ["q_porj"]}},
        {"parallel": {"tensor": True}},
    ],
)
def test_what_the_parser_refuses_does_not_pass(content):
    assert faults(content, schema()) != []


def test_what_the_parser_accepts_passes():
    content = {
        "selection": {"rho": "auto", "layer": [0, -1], "threshold": None},
        "lora": {"targets": "all-linear"},
        "checkpoint": {"resume": 40},
        "optimizer": {"learning_rate": 1},
        "logging": None,
    }
    assert faults(content, schema()) == []


def test_it_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--print_schema"])
    assert stop.value.code == 0 and json.loads(capsys.readouterr().out) == schema()
