"""What is GPT-OSS's own: tensors of all experts, and folders in MXFP4, which transformers makes one in BF16 of."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import check_weights, read_shard, to_hugging_face
from tests.helpers.toy import make_tokenizer
from tests.helpers.workbench import make_model

DOCUMENTED = Path(__file__).parents[3] / "docs" / "models.md"
LAYER = 2
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Numbers of four bits (OCP Microscaling Formats, 5.3.3)."""


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


@pytest.fixture
def quantised(folder, tmp_path):
    """(folder in MXFP4, the numbers it holds)."""
    draw = torch.Generator().manual_seed(0)
    stored, wanted = {}, {}
    for name, value in load_file(f"{folder}/model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = wanted[name] = value.bfloat16()
            continue
        experts, inputs, outputs = value.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=draw)
        exponents = torch.randint(120, 130, (experts, outputs, inputs // 32), generator=draw)
        stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = exponents.to(torch.uint8)
        numbers = E2M1[codes] * torch.exp2(exponents - 127.0)[..., None]
        wanted[name] = numbers.flatten(2).transpose(1, 2).bfloat16()
    made = tmp_path / "mxfp4"
    made.mkdir()
    save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path(folder, "config.json").read_text())
    spared = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": spared}}
    (made / "config.json").write_text(json.dumps(config))
    make_tokenizer(made, vocab_size=99)
    return made, wanted


def test_mxfp4_is_refused_and_the_documented_lines_make_bf16_of_it(quantised, tmp_path, capsys):
    made, wanted = quantised
    assert main(["from-hf", f"--hf={made}", f"--output={tmp_path}/megatron"]) == 2
    assert (
        "weights quantised by 'mxfp4' are not read: name the folder of the BF16 weights, or" in capsys.readouterr().err
    )
    (lines,) = re.findall(r"<<'END'\n([^`]*Mxfp4Config[^`]*)END\n", DOCUMENTED.read_text(encoding="utf-8"))
    exec(lines.replace("models/", f"{tmp_path}/"), {})
    written = str(tmp_path / "bf16")
    check_weights(HuggingFaceWeights(written), read_architecture(written))
    found = load_file(f"{written}/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
