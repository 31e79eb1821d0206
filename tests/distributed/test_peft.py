"""A PEFT folder becomes a checkpoint of adapters: the same numbers, back again bit for bit, on any layout."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.conversion.peft import PeftFolder, from_peft
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store, make_trainer

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
LORA = {"rank": 3, "alpha": 5.0, "rank_stabilized": True, "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, and a PEFT folder whose adapters do something; `logits`: PEFT's."""
    path = tmp_path_factory.mktemp("peft")
    make_model(path / "base", "llama", seed=1)
    make_store(path / "data", make_samples(4, seed=3, longest=30))
    torch.manual_seed(7)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules="all-linear",
        exclude_modules=["k_proj", "v_proj", "gate_proj"],
    )
    model = get_peft_model(load_model(path / "base"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path / "adapters")
    change_config(path / "adapters", exclude_modules=None, base_model_name_or_path=str(path / "base"))
    with torch.no_grad():
        torch.save(model(TOKENS).logits[0], path / "logits.pt")
    return path


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def convert_and_back(rank, folder):
    from megatron_sstoken.conversion.hf import to_hf

    _, lora = from_peft(f"{folder}/adapters", f"{folder}/megatron")
    to_hf(f"{folder}/megatron", f"{folder}/back")
    return {name: getattr(lora, name) for name in LORA}


def logits_of_a_run(rank, folder):
    """This rank's logits of a run that starts from the checkpoint, with tensor parallel 2."""
    from megatron_sstoken.model.attention import sample_bounds

    changes = {f"lora__{name}": value for name, value in LORA.items()}
    settings = make_settings(
        f"{folder}/base", f"{folder}/data", model__checkpoint=f"{folder}/megatron", parallel__tensor=2, **changes
    )
    trainer = make_trainer(settings)
    trainer.model.train(False)
    length = TOKENS.shape[1]
    with torch.no_grad():
        return trainer.model.unwrapped[0](
            TOKENS, torch.arange(length).unsqueeze(0), None, packed_seq_params=sample_bounds([length])
        )[0]


def test_the_matrices_come_back_bit_for_bit(folder):
    (lora,) = run_distributed(convert_and_back, 1, str(folder))
    assert lora == LORA
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapters", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    logits = torch.cat(run_distributed(logits_of_a_run, 2, str(folder)), dim=-1)[:, :99]
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    assert (logits - wanted).abs().max() < 1e-4
    with torch.no_grad():
        assert (load_model(folder / "base")(TOKENS).logits[0] - wanted).abs().max() > 1e-2, "they do something"


def without_a_layer(tensors):
    return {name: value for name, value in tensors.items() if ".layers.2." not in name or "q_proj" not in name}


def of_another_size(tensors):
    return {
        name: torch.cat([value, value]) if name.endswith("lora_B.weight") else value for name, value in tensors.items()
    }


WRONG = {
    "DoRA": ({"use_dora": True}, None, "use_dora .DoRA. is not supported"),
    "modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save .whole modules"),
    "ranks and biases": ({"rank_pattern": {"q_proj": 8}, "bias": "all"}, None, "rank_pattern .*bias .trained biases"),
    "another method": ({"peft_type": "IA3"}, None, "is not the configuration of LoRA adapters"),
    "a layer without": ({}, without_a_layer, "holds no base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
    "another base": ({}, of_another_size, "has shape .*, the base asks for .*: name the adapters' own base with --hf"),
    "tensors of a head": ({}, lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, "lm_head"),
    "no base": ({"base_model_name_or_path": "nowhere/base"}, None, "names no base that is here: .* with --hf"),
}


def try_all(rank, folder):
    found = {}
    for case in WRONG:
        try:
            from_peft(f"{folder}/{case}", f"{folder}/out")
        except ValueError as error:
            found[case] = str(error)
    return found


def test_what_is_not_lora_on_every_layer_is_refused_by_name(folder, tmp_path):
    for case, (changes, mutate, _) in WRONG.items():
        shutil.copytree(folder / "adapters", tmp_path / case)
        change_config(tmp_path / case, **changes)
        if mutate:
            weights = tmp_path / case / "adapter_model.safetensors"
            save_file(mutate(load_file(weights)), weights)
    (found,) = run_distributed(try_all, 1, str(tmp_path))
    for case, (_, _, message) in WRONG.items():
        assert case in found, case
        with pytest.raises(ValueError, match=message):
            raise ValueError(found[case])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json: name a PEFT folder"):
        PeftFolder(str(tmp_path))
