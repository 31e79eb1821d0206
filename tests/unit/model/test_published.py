"""The built-in architectures: parameter counts of the published weights, and config.json files that transformers reads."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sstoken.model.published import PUBLISHED, find_architecture, write_config
from tools.make_config import main

# Totals that the Hugging Face pages state for the published safetensors.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_those_of_the_published_model(name, tmp_path):
    assert find_architecture(name).num_parameters() == PARAMETERS[name]
    write_config(name, tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path)))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PARAMETERS[name]


def test_a_folder_reads_as_the_name_does(tmp_path):
    assert main(["--model", "llama-3.2-3b", "--output", str(tmp_path / "new")]) == 0
    assert find_architecture(str(tmp_path / "new")) == find_architecture("llama-3.2-3b")


def test_mistakes_are_told(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"neither a folder nor built in.*llama-3\.1-70b"):
        find_architecture("llama-9")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["--model", "llama-3.2-1b", "--output", str(tmp_path)]) == 2
    assert "is another model's" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama"}
