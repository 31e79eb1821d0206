"""What is GPT-OSS's own: tensors of all experts."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import read_shard, to_hugging_face
from tests.helpers.workbench import make_model

LAYER = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss", intermediate_size=64)


def rules_of(a, name):
    """Expert → the rule whose tensor ends so."""
    return {rule.expert: rule for rule in a.weight_rules() if rule.hugging_face[0].endswith(f".experts.{name}")}


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_each_expert_has_its_part(folder, name):
    a, tensors = read_architecture(folder), HuggingFaceWeights(folder)
    stack = load_file(f"{folder}/model.safetensors")[f"model.layers.{LAYER}.mlp.experts.{name}"]
    rules = rules_of(a, name)
    assert len(rules) == len(stack) == 4
    for expert, rule in rules.items():
        found = read_shard(tensors, rule, LAYER, a, torch.Size([]), 0, 1)
        wanted = stack[expert].movedim(-1, 0)
        for output in range(len(found)):  # rows of the gate, then those of up
            half = len(found) // 2
            source = output if "down" in name else 2 * (output % half) + output // half
            assert torch.equal(found[output], wanted[source])
        ((back_name, back),) = to_hugging_face(rule, LAYER, found, a)
        assert back_name.endswith(f".{LAYER}.mlp.experts.{name}") and torch.equal(back, stack[expert])
