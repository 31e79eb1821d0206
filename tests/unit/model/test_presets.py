"""The catalogue: architectures that our reader and transformers understand, with the published numbers of parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sstoken.commands.make_config import main
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.presets import MODELS, model_config

PARAMETERS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
}
"""Of each model's safetensors, as huggingface.co shows them."""


@pytest.mark.parametrize("name", MODELS)
def test_architectures_have_the_published_size(name, tmp_path):
    assert main([name, "--output", str(tmp_path)]) == 0
    architecture = read_architecture(str(tmp_path))
    assert architecture.num_parameters() == PARAMETERS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path)))
    assert model.num_parameters() == PARAMETERS[name]


def test_each_caller_has_its_own_copy():
    model_config("Llama-3.1-8B")["rope_scaling"]["factor"] = 1.0
    assert model_config("Llama-3.1-8B")["rope_scaling"]["factor"] == 8.0
    with pytest.raises(ValueError, match="GPT-5 is not in the presets: use one of Llama-3.2-1B"):
        model_config("GPT-5")


def test_another_config_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["Qwen2.5-7B", "--output", str(tmp_path)]) == 2
    assert "is there already and differs" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_stand_in_data_is_prepared_data(tmp_path):
    assert main(["Llama-3.2-1B", "--output", str(tmp_path / "model"), "--data", str(tmp_path / "data")]) == 0
    store = SampleStore(tmp_path / "data")
    assert len(store) == 1000 and (store.response_counts > 0).all()
    assert store.lengths.min() >= 32 and 300 < store.lengths.mean() < 800
