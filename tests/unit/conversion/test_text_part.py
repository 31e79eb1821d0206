"""Text models that are taken out of models that read images, too, and put back: transformers' models of both, and tensors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.conversion.text_part import put_text, take_text
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.model.families.registry import family_of
from tests.helpers.workbench import load_model, make_model

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING |= {"image_size": 28, "patch_size": 14}
PARTS = {
    "gemma3": (
        {"model_type": "gemma3_text", "sliding_window": 16},
        {"model_type": "siglip_vision_model", **SEEING},
        {"mm_tokens_per_image": 4, "image_token_index": 63},
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "pixtral", **SEEING},
        {"image_token_index": 63},
    ),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **SEEING}, {"image_token_index": 63}),
    "qwen3_5": (
        family_of("qwen3_5_text").tiny
        | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
        },
        {"image_token_id": 63, "video_token_id": 62},
    ),
}
"""Model → fields of its text model, of what sees, and more."""
SMALL_FILES = ConversionOptions(shard_size=20_000)


def load_whole(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40).reshape(1, -1)).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("text_part")
    for number, (name, (text, seeing, more)) in enumerate(PARTS.items()):
        torch.manual_seed(number)
        config = AutoConfig.for_model(
            name,
            text_config={**TEXT, **text},
            vision_config=seeing,
            **more,
        )
        AutoModelForImageTextToText.from_config(config).save_pretrained(path / name)
        (path / name / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        (path / name / "preprocessor_config.json").write_text("{}")
    since = path / "names_since"  # as transformers' modules call them, and some save them
    shutil.copytree(path / "llava", since)
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): one
        for name, one in tensors_of(since).items()
    }
    save_file(renamed, since / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("name", [*PARTS, "names_since"])
def test_the_text_model_is_taken_out_and_put_back(folders, tmp_path, name):
    told: list[str] = []
    text = take_text(folders / name, tmp_path / "text", options=SMALL_FILES, tell=told.append)
    assert ("visual (" if name == "qwen3_5" else "multi_modal_projector (") in told[0]
    assert (text / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not {"chat_template.json", "preprocessor_config.json"} & {file.name for file in text.iterdir()}
    before, model = load_whole(folders / name), load_model(text)
    assert type(model).__name__.endswith("ForCausalLM")
    torch.testing.assert_close(logits(model), logits(before), rtol=0, atol=1e-5)

    whole = tensors_of(folders / name)
    back = put_text(folders / name, text, tmp_path / "same", options=SMALL_FILES)
    assert {key: torch.equal(one, whole[key]) for key, one in tensors_of(back).items()} == dict.fromkeys(whole, True)

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(50)
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("tuned {{ messages }}")
    back = put_text(folders / name, tmp_path / "tuned", tmp_path / "back", tell=told.append)
    assert (back / "chat_template.jinja").read_text() == "tuned {{ messages }}" and "in place of" in told[-1]
    after = load_whole(back)
    torch.testing.assert_close(logits(after), logits(model), rtol=0, atol=1e-5)
    assert (logits(after) - logits(before)).abs().max() > 1e-3
    changed = {key for key, one in tensors_of(back).items() if not torch.equal(one, whole[key])}
    assert len(changed) == 1 and changed.pop().endswith("layers.1.mlp.down_proj.weight")


def test_numbers_are_those_of_the_folder_in_its_type(folders, tmp_path):
    text = take_text(folders / "llava", tmp_path / "text")
    load_model(text).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    back = tensors_of(put_text(folders / "llava", tmp_path / "bf16", tmp_path / "back"))
    assert {one.dtype for one in back.values()} == {torch.float32}
    before = tensors_of(folders / "llava")["language_model.model.embed_tokens.weight"]
    assert torch.equal(back["language_model.model.embed_tokens.weight"], before.bfloat16().float())


def test_damaged_folders_are_told(folders, tmp_path):
    """Both that are read have checksums where a conversion made them."""
    text = take_text(folders / "llava", tmp_path / "text")
    whole = put_text(folders / "llava", text, tmp_path / "whole")
    for folder in (text, whole):
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-4, 2)
            file.write(b"gone")
    for make in (
        lambda options: take_text(whole, tmp_path / "taken", options=options),
        lambda options: put_text(folders / "llava", text, tmp_path / "put", options=options),
    ):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            make(ConversionOptions())
        make(ConversionOptions(verify=False))


def test_the_folder_that_was_taken_out_is_verified(folders, tmp_path, capsys):
    options = [f"--hf={folders / 'gemma3'}", f"--output={tmp_path / 'text'}"]
    assert main(["take-text", *options]) == 0
    assert main(["verify", f"--hf={tmp_path / 'text'}"]) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["config", "text_config"])
def test_quantised_weights_are_dequantised_first(folders, tmp_path, capsys, place):
    whole, stored, wanted = tmp_path / "fp8", {}, {}
    shutil.copytree(folders / "mistral3", whole)
    for name, tensor in tensors_of(whole).items():
        quantised = "language_model" in name and name.endswith("_proj.weight")
        stored[name] = tensor.to(torch.float8_e4m3fn) if quantised else tensor
        if quantised:
            stored[f"{name}_scale_inv"] = torch.tensor(0.5)
            wanted[name.partition("layers.")[2]] = stored[name].float() / 2
    save_file(stored, whole / "model.safetensors", {"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    {"config": config, **config}[place]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (whole / "config.json").write_text(json.dumps(config))
    assert main(["take-text", f"--hf={whole}", f"--output={tmp_path / 'text'}"]) == 2
    assert f"`python tools/convert_checkpoint.py dequantize --hf {whole} --output FOLDER`" in capsys.readouterr().err
    assert main(["dequantize", f"--hf={whole}", f"--output={tmp_path / 'bf16'}", "--dtype=fp32"]) == 0
    found = tensors_of(take_text(tmp_path / "bf16", tmp_path / "text"))
    kept = {name.partition("layers.")[2]: tensor for name, tensor in found.items() if name.endswith("_proj.weight")}
    assert {name: torch.equal(tensor, wanted[name]) for name, tensor in kept.items()} == dict.fromkeys(wanted, True)


def test_what_does_not_fit(folders, tmp_path, capsys):
    def said(*arguments):
        assert main([*map(str, arguments), f"--output={tmp_path / 'out'}"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    plain = make_model(tmp_path / "plain", "llama")
    assert "gemma3' describes more than a model of text" in said("from-hf", f"--hf={folders / 'gemma3'}")
    assert f"take-text --hf {folders / 'gemma3'} --output" in said("from-hf", f"--hf={folders / 'gemma3'}")
    assert "it describes a model of text alone" in said("take-text", f"--hf={plain}")
    problem = said("put-text", f"--hf={folders / 'llava'}", f"--text={plain}")
    assert "plain is another model than" in problem and "num_layers (2, 4)" in problem
    other = tmp_path / "other"
    shutil.copytree(folders / "llava", other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"] = {"model_type": "gpt2"}
    (other / "config.json").write_text(json.dumps(config))
    assert "text_config: model_type='gpt2' is not supported" in said("take-text", f"--hf={other}")
    shutil.copy(tmp_path / "plain" / "model.safetensors", other)
    (other / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "llama"}}))
    assert "holds no model of text beside others" in said("take-text", f"--hf={other}")
