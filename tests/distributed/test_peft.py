"""A PEFT folder becomes a checkpoint of adapters: the same numbers, back again bit for bit, on any layout."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.checkpoint.manifest import open_checkpoint, read_run_state
from megatron_sstoken.checkpoint.weights_source import WeightsSource, require_base
from megatron_sstoken.config import SettingsError
from megatron_sstoken.conversion.adapters import AdapterCheckpoint
from megatron_sstoken.conversion.peft import PeftFolder, from_peft
from megatron_sstoken.integrity import checksum_of, read_checksums, write_checksums
from megatron_sstoken.model.families import read_architecture
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store, make_trainer

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
LORA = {"rank": 3, "alpha": 5.0, "rank_stabilized": True, "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, and a PEFT folder whose adapters do something; `logits`: PEFT's.

    `anew`: the model with its config.json written anew; `other`: with one number that differs.
    """
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
    shutil.copytree(path / "base", path / "anew")
    config = path / "anew" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "elsewhere"}, sort_keys=True))
    shutil.copytree(path / "base", path / "other")
    weights = load_file(path / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 6] += 1e-3
    save_file(weights, path / "other" / "model.safetensors")
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
    """This rank's logits of a run that starts from the checkpoint, with tensor parallel 2; what it says of another base."""
    from megatron_sstoken.model.attention import sample_bounds

    changes = {f"lora__{name}": value for name, value in LORA.items()}
    settings = make_settings(
        f"{folder}/anew", f"{folder}/data", model__checkpoint=f"{folder}/megatron", parallel__tensor=2, **changes
    )
    trainer = make_trainer(settings)
    trainer.model.train(False)
    length = TOKENS.shape[1]
    with torch.no_grad():
        logits = trainer.model.unwrapped[0](
            TOKENS, torch.arange(length).unsqueeze(0), None, packed_seq_params=sample_bounds([length])
        )[0]
    try:
        require_base("here", trainer.adapters, WeightsSource(f"{folder}/other"), trainer.layout)
    except SettingsError as error:
        return logits, str(error)


@pytest.fixture(scope="module")
def converted(folder):
    """The settings that fit the checkpoint."""
    (lora,) = run_distributed(convert_and_back, 1, str(folder))
    return lora


def test_the_matrices_come_back_bit_for_bit(folder, converted):
    assert converted == LORA
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapters", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    parts, said = zip(*run_distributed(logits_of_a_run, 2, str(folder)), strict=True)
    logits = torch.cat(parts, dim=-1)[:, :99]
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    assert (logits - wanted).abs().max() < 1e-4
    with torch.no_grad():
        assert (load_model(folder / "base")(TOKENS).logits[0] - wanted).abs().max() > 1e-2, "they do something"
    for told in said:
        assert "were trained on other weights than those of" in told and "(other numbers in model.layers.1)" in told


def test_the_base_may_be_a_name_in_the_hubs_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--meta--Llama-1B" / "snapshots" / "a1b2"
    shutil.copytree(folder / "base", snapshot)
    (tmp_path / "models--meta--Llama-1B" / "refs").mkdir()
    (tmp_path / "models--meta--Llama-1B" / "refs" / "main").write_text("a1b2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    change_config(tmp_path / "adapters", base_model_name_or_path="meta/Llama-1B")
    assert PeftFolder(str(tmp_path / "adapters")).base == str(snapshot)


def of_a_version_before(checkpoint, base):
    """Make a checkpoint one that knows its base by the bytes of its files."""
    state = read_run_state(checkpoint)
    assert state.adapters is not None
    adapters = replace(state.adapters, base=None, base_fingerprint=WeightsSource(str(base)).fingerprint())
    content = asdict(replace(state, adapters=adapters))
    del content["adapters"]["base"]
    content["num_rows"] = content.pop("num_packs")
    (checkpoint / "sstoken.json").write_text(json.dumps(content))
    write_checksums(checkpoint, read_checksums(checkpoint) | {"sstoken.json": checksum_of(checkpoint / "sstoken.json")})


def test_the_base_is_known_by_its_architecture_and_its_numbers(folder, converted, tmp_path):
    shutil.copytree(folder / "megatron", tmp_path / "before")
    of_a_version_before(tmp_path / "before" / "step_0000000", folder / "base")

    def said(checkpoint, base):
        adapters = AdapterCheckpoint(open_checkpoint(str(checkpoint)), read_architecture(str(folder / "base")))
        try:
            adapters.base(str(folder / base))
        except ValueError as error:
            return str(error)

    assert (
        said(folder / "megatron", "base")
        is said(folder / "megatron", "anew")
        is said(tmp_path / "before", "base")
        is None
    )
    assert re.search(
        r"other does not hold the weights .* \(other numbers in model.layers.1\): name their folder with --hf",
        said(folder / "megatron", "other"),
    )
    for base in ("anew", "other"):  # these cannot tell
        assert "(a byte of its weights or of config.json, which is all that" in said(tmp_path / "before", base)


def test_merged_weights_are_not_rounded_before_they_are_written(folder, converted):
    adapters = AdapterCheckpoint(open_checkpoint(str(folder / "megatron")), read_architecture(str(folder / "base")))
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "base" / "model.safetensors")[name].bfloat16()
    assert torch.equal(adapters.merged(name, weight), adapters.merged_delta(name) + weight.float())


def without_a_layer(tensors):
    return {name: value for name, value in tensors.items() if ".layers.2." not in name or "q_proj" not in name}


def of_another_size(tensors):
    return {
        name: torch.cat([value, value]) if name.endswith("lora_B.weight") else value for name, value in tensors.items()
    }


LAYER = "base_model.model.model.layers.0"
WRONG = {
    "DoRA": ({"use_dora": True}, None, "holds no .*o_proj.lora_magnitude_vector: adapters have to be whole"),
    "tokens": ({"trainable_token_indices": [3]}, None, "trainable_token_indices .tokens .*. is not supported"),
    "modules": ({"modules_to_save": ["norm", "lm_head"]}, None, "modules_to_save .whole .*: norm. is not supported"),
    "a module that is not there": ({"modules_to_save": ["lm_head"]}, None, "holds no base_model.model.lm_head.weight"),
    "biases": ({"layer_replication": [[0, 2]], "bias": "all"}, None, "layer_replication .*bias .trained biases"),
    "ranks": (
        {"rank_pattern": {"q_proj": 8}},
        None,
        "rank_pattern, alpha_pattern .others for q_proj. is not supported",
    ),
    "another method": ({"peft_type": "IA3"}, None, "is not the configuration of LoRA adapters"),
    "a layer without": ({}, without_a_layer, "holds no base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
    "another base": ({}, of_another_size, "has shape .*, the base asks for .*: name the adapters' own base with --hf"),
    "tensors of a head": ({}, lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, "lm_head"),
    "experts": (
        {},
        lambda tensors: tensors | {f"{LAYER}.mlp.experts.0.up_proj.lora_A.weight": torch.ones(2)},
        "holds .*experts.0.up_proj.lora_A.weight .1 such., for which the base has no place: name the adapters' own base",
    ),
    "an adapter of the embedding": (
        {},
        lambda tensors: tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)},
        "holds no .*embed_tokens.lora_embedding_B: adapters have to be whole, on every layer and expert",
    ),
    "linears of another model": (
        {},
        lambda tensors: {name.replace("up_proj", "gate_up_proj"): value for name, value in tensors.items()},
        "has adapters on gate_up_proj, which the base does not have: name the adapters' own base",
    ),
    "no base": ({"base_model_name_or_path": None}, None, "names no base: .* with --hf"),
    "a base that is not here": (
        {"base_model_name_or_path": "nowhere/base"},
        None,
        "names nowhere/base, which is not here, as its base: .* with --hf",
    ),
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
