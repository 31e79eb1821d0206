"""The identity of a model: what does not change what it computes is not seen, what does is named."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.model import identity
from megatron_sstoken.model.identity import ModelIdentity
from tests.helpers.workbench import load_model, make_model


def identity_of(folder):
    return WeightsSource(str(folder)).identity


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model in bf16."""
    folder = tmp_path_factory.mktemp("identity") / "base"
    make_model(folder, "llama")
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_config(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    return target


def with_tensors(folder, target, change):
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def test_the_same_model_in_other_files(base, tmp_path):
    wanted = identity_of(base)
    assert ModelIdentity(**json.loads(json.dumps(asdict(wanted)))) == wanted, "JSON holds it"
    same = {
        "config written anew": with_config(base, tmp_path / "config", _name_or_path="elsewhere", use_cache=False),
        "in fp32": with_tensors(base, tmp_path / "fp32", lambda all: {name: one.float() for name, one in all.items()}),
    }
    load_model(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shutil.copytree(base, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(base / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    same |= {name: tmp_path / name for name in ("shards", "pickled")}
    for name, folder in same.items():
        found = identity_of(folder)
        assert found == wanted and wanted.differences(found) == [], name


def scaled(part):
    """All tensors whose names begin with `part` differ a little."""
    return lambda tensors: {name: one * 1.01 if name.startswith(part) else one for name, one in tensors.items()}


CHANGED = {
    "model.layers.2.mlp": ["other numbers in model.layers.2"],
    "lm_head": ["other numbers in lm_head.weight"],
    "model.": ["other numbers in model.embed_tokens.weight, model.layers.0 and 4 more of 7 parts"],
}


@pytest.mark.parametrize("num_read", [1 << 26, 100])
@pytest.mark.parametrize("part", CHANGED)
def test_other_numbers_are_named(base, tmp_path, monkeypatch, part, num_read):
    """Also where but a few numbers of each tensor are read."""
    monkeypatch.setattr(identity, "_NUM_READ", num_read)
    monkeypatch.setattr(identity, "_LEAST", 10)
    other = with_tensors(base, tmp_path / "other", scaled(part))
    assert identity_of(base).differences(identity_of(other)) == CHANGED[part]


def test_another_architecture_is_named(base, tmp_path):
    other = with_config(base, tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    found = identity_of(base).differences(identity_of(other))
    scaling = "{'kind': 'llama3', 'factor': 8.0, 'original_max_positions': 32}"
    assert found == ["rope_base was 10000.0 and is 70000.0", f"rope_scaling was {scaling} and is None"]
    biased = ModelIdentity({"qkv_bias": True}, {})
    assert biased.differences(ModelIdentity({}, {})) == ["qkv_bias was True and is False"], "a default is not stored"


@pytest.mark.parametrize("place", [0, 500, 999])
def test_of_large_tensors_first_and_last_numbers_are_read_and_some_between(monkeypatch, place):
    monkeypatch.setattr(identity, "_RANGE", 10)
    ranges = identity._ranges(1000, 50)
    assert sum(last - first for first, last in ranges) == 50
    assert any(first <= place < last for first, last in ranges)
    assert identity._ranges(50, 50) == [(0, 50)] and len(identity._ranges(1000, 10)) == 2
