"""Folders in FP8 and MXFP4, quantised here: transformers' own numbers of them, and those of the formats' definitions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.conversion import dequantize as module
from megatron_sstoken.conversion.dequantize import dequantize
from megatron_sstoken.conversion.number_formats import fp8_matrix, mxfp4_matrix
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import check_weights
from tests.helpers.toy import make_tokenizer
from tests.helpers.workbench import make_model

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
SMALL_FILES = ConversionOptions(shard_size=20_000)
UP, STACK = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.down_proj"


def fp8_number(code):
    """The number of a byte in E4M3 (OCP 8-bit floating point, table 1), in float64."""
    sign, exponent, fraction = 1 - 2 * (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def fp4_number(code):
    """The number of four bits in E2M1, in float64."""
    sign, exponent, fraction = 1 - 2 * (code >> 3), code >> 1 & 3, code & 1
    return sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1))


def quantise_fp8(weight, block, scale_type):
    """Codes and scales of a matrix: the largest number of each block becomes 448."""
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    codes = torch.empty(weight.shape, dtype=FP8)
    scales = torch.empty(-(-rows // height), -(-columns // width), dtype=scale_type)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).clamp(-448, 448).to(FP8)
    return codes, scales


def quantise_mxfp4(stack):
    """Blocks and scales of [experts, inputs, outputs]: the largest of 32 numbers has an exponent of 2, as 4 and 6 have."""
    numbers = stack.transpose(1, 2).unflatten(2, (-1, 32)).double()
    exponents = numbers.abs().amax(-1).log2().floor() - 2
    steps = torch.tensor([fp4_number(code) for code in range(16)], dtype=torch.float64)
    codes = ((numbers / exponents.exp2()[..., None])[..., None] - steps).abs().argmin(-1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def quantise(folder, config, scale_type=torch.float32):
    """Make the folder of a model one of quantised weights, in two files, as the hub's are."""
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if config["quant_method"] == "mxfp4" and name.endswith((".gate_up_proj", ".down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = quantise_mxfp4(tensor)
        elif config["quant_method"] == "fp8" and re.search(r"layers\.[1-3].*_proj.*\.weight$", name):
            codes, scales = quantise_fp8(tensor, config["weight_block_size"], scale_type)
            stored[name], stored[f"{name}_scale_inv"] = codes, scales
            if config["weight_block_size"] is None:
                stored[f"{name}_scale_inv"] = scales[0, 0].clone()
                stored[name.replace("weight", "activation_scale")] = torch.tensor(0.5, dtype=scale_type)
        else:
            stored[name] = tensor.bfloat16()
    write(folder, stored, config)


def write(folder, stored, quantisation):
    names = sorted(stored)
    files = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, held in files.items():
        save_file({name: stored[name] for name in held}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of quantised miniatures."""
    path = tmp_path_factory.mktemp("quantised")
    for name, family, changes, config, scale_type in (
        ("deepseek_v3", "deepseek_v3", {}, BLOCKS | {"weight_block_size": [4, 4]}, torch.float32),
        (
            "not divided",
            "deepseek_v3",
            {},
            BLOCKS,
            torch.float32,
        ),  # transformers refuses 20 rows, and takes 2 × 12 for 16 + 8
        ("qwen3", "qwen3", {}, BLOCKS, torch.bfloat16),
        ("ministral3", "ministral3", {}, TENSORS, torch.bfloat16),
        ("gpt_oss", "gpt_oss", {"intermediate_size": 64}, MXFP4, None),
    ):
        make_model(path / name, family, **changes)
        quantise(path / name, config, scale_type)
        make_tokenizer(path / name, vocab_size=99)
    return path


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3", "ministral3", "gpt_oss"])
def test_the_numbers_are_those_of_transformers(folders, tmp_path, name):
    told: list[str] = []
    made = dequantize(str(folders / name), str(tmp_path / "made"), options=SMALL_FILES, tell=told.append)
    config = Mxfp4Config if name == "gpt_oss" else FineGrainedFP8Config
    theirs, ours = load(folders / name, quantization_config=config(dequantize=True)), load(made)
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    words = torch.arange(1, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=words).logits, theirs(input_ids=words).logits)

    before, after = tensors_of(folders / name), tensors_of(made)
    kept = [key for key in before if key in after and before[key].dtype is not FP8]
    assert all(torch.equal(before[key], after[key]) for key in kept) and "model.embed_tokens.weight" in kept
    assert told == [f"made bfloat16: {len(after) - len(kept)} tensors; kept as they are: {len(kept)}"]
    check_weights(HuggingFaceWeights(str(made)), read_architecture(str(made)))
    assert (made / "tokenizer.json").read_bytes() == (folders / name / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("shape", "block"),
    [((40, 33), (8, 16)), ((300, 70), (128, 128)), ((5, 3), (5, 3)), ((200, 8), (150, 3)), ((131, 9), (1, 9))],
)
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_code_times_the_scale_of_its_block(shape, block, scale_type, dtype):
    """In float64 a product of 4 bits and 24 is exact; of transformers' product in fp32 it is the rounded one."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 255, shape, generator=draw)
    codes[codes == 127] = 0  # 127 and 255 are no numbers
    grid = [-(-side // part) for side, part in zip(shape, block, strict=True)]
    scales = (torch.rand(grid, generator=draw) * 20 - 10).exp().to(scale_type)
    table = np.array([fp8_number(code) for code in range(256)])
    rows, columns = (np.arange(side) // part for side, part in zip(shape, block, strict=True))
    product = table[codes.numpy()] * scales.float().double().numpy()[rows[:, None], columns[None, :]]
    wanted = torch.from_numpy(product).float().to(dtype)
    found = fp8_matrix(codes.to(torch.uint8).view(FP8), scales, dtype, block=block)
    assert found.dtype is dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_code_times_a_power_of_two(dtype):
    """Exact in both types, from numbers that are below the normal ones to nearly the largest."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (260, 2, 32), generator=draw)
    scales = torch.randint(0, 252, (260, 2), generator=draw)
    table = np.array([fp4_number(code) for code in range(16)])
    product = table[codes.numpy()] * 2.0 ** (scales.numpy()[..., None] - 127.0)
    wanted = torch.from_numpy(product.reshape(260, 64).T)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    found = mxfp4_matrix(blocks, scales.to(torch.uint8), dtype)
    assert found.dtype is dtype and torch.equal(found.double(), wanted)


@pytest.mark.parametrize(("config", "grid"), [(BLOCKS, (2, 2, 3)), (TENSORS, (2,)), (TENSORS, (2, 2, 1))])
def test_experts_in_one_tensor(folders, tmp_path, config, grid):
    """[experts, rows, columns], as transformers holds them: scales by blocks, of each expert, of its gate and up."""
    draw = torch.Generator().manual_seed(0)
    codes, scales = torch.randn(2, 16, 48, generator=draw).to(FP8), torch.rand(grid, generator=draw)
    stored = tensors_of(folders / "qwen3") if config is BLOCKS else tensors_of(folders / "ministral3")
    (tmp_path / "config.json").write_text("{}")
    added = {f"{STACK}": codes, f"{STACK}_scale_inv": scales}
    added |= {} if config is BLOCKS else {f"{STACK}_activation_scale": torch.ones(2)}
    write(tmp_path, stored | added, config)
    made = tensors_of(dequantize(str(tmp_path), str(tmp_path / "made"), options=ConversionOptions(dtype="fp32")))
    parts = scales.reshape(2, *(grid[1:] or (1, 1)))
    wanted = codes.float() * parts.repeat_interleave(16 // parts.shape[1], 1).repeat_interleave(48 // parts.shape[2], 2)
    assert torch.equal(made[STACK], wanted) and f"{STACK}_activation_scale" not in made
    assert made[UP].dtype is torch.float32 and made["model.norm.weight"].dtype is torch.bfloat16


def test_a_folder_is_refused_dequantised_and_verified(folders, tmp_path, capsys):
    given, made = folders / "not divided", tmp_path / "bf16"
    assert main(["from-hf", f"--hf={given}", f"--output={tmp_path}/megatron"]) == 2
    said = capsys.readouterr().err
    assert (
        f"'fp8' are not read: make a folder of BF16 weights with `python tools/convert_checkpoint.py dequantize --hf {given}"
        in said
    )
    assert main(["dequantize", f"--hf={given}", f"--output={made}", "--max_memory=100KB"]) == 0
    assert "made bfloat16: " in capsys.readouterr().out
    assert main(["verify", f"--hf={made}", "--positions=32"]) == 0
    whole, found = tensors_of(make_model(tmp_path / "whole", "deepseek_v3")), tensors_of(made)
    assert whole.keys() == found.keys() and whole["model.layers.1.self_attn.q_a_proj.weight"].shape == (20, 32)
    for name, tensor in found.items():  # four significant bits, within half of the last
        torch.testing.assert_close(tensor.float(), whole[name].float(), rtol=0.07, atol=1e-4, msg=name)
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert main(["dequantize", f"--hf={made}", f"--output={tmp_path}/again"]) == 2
    assert "has no quantization_config" in capsys.readouterr().err


def test_goes_on_where_it_was_interrupted(folders, tmp_path, monkeypatch):
    """Not all is made again, and the bytes are those of a run that nobody interrupts."""
    calls = []

    def run(output, limit=None):
        def counting(*given, **settings):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(given)
            return fp8_matrix(*given, **settings)

        calls.clear()
        monkeypatch.setattr(module, "fp8_matrix", counting)
        options = ConversionOptions(shard_size=20_000, workers=1)
        return dequantize(str(folders / "deepseek_v3"), str(tmp_path / output), options=options)

    whole = run("whole")
    total = len(calls)
    with pytest.raises(KeyboardInterrupt):
        run("made", limit=total // 2)
    assert not (tmp_path / "made").exists()
    made = run("made")
    assert 0 < len(calls) < total  # what was made and not yet noted is made again
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in made.iterdir())
    assert all((made / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_memory_is_that_of_one_expert(folders, tmp_path):
    options = ConversionOptions(max_memory=40_000, workers=1)  # a tensor of all four takes 86 KB
    made = dequantize(str(folders / "gpt_oss"), str(tmp_path / "made"), options=options)
    assert tensors_of(made)[STACK].nbytes == 4 * 64 * 32 * 2
    with pytest.raises(ValueError, match=r"--max_memory=1 KB is too small: converting the largest tensor, .*_proj"):
        dequantize(str(folders / "gpt_oss"), str(tmp_path / "other"), options=ConversionOptions(max_memory=1000))


NAN, INF = float("nan"), float("inf")


def with_scale(name, change):
    """A change of one tensor among those of a folder."""
    return lambda stored: stored.update({name: change(stored[name])})


def spoilt(tensor, value):
    flat = tensor.clone().reshape(-1)
    flat[-1] = value
    return flat.reshape(tensor.shape)


BAD = {
    "scale missing": (
        "qwen3",
        BLOCKS,
        lambda s: s.pop(f"{UP}_scale_inv"),
        f"{UP} is quantised, and its scales, {UP}_scale_inv",
    ),
    "scale alone": (
        "qwen3",
        BLOCKS,
        lambda s: s.pop(UP),
        f"{UP}_scale_inv belongs to a quantised tensor that is missing",
    ),
    "scale of bf16": (
        "qwen3",
        BLOCKS,
        with_scale(UP, torch.Tensor.bfloat16),
        "_scale_inv belongs to .* or not quantised",
    ),
    "input alone": (
        "ministral3",
        TENSORS,
        lambda s: s.update({"x.activation_scale": torch.ones(1)}),
        "x.activation_scale bel",
    ),
    "shape": (
        "qwen3",
        BLOCKS,
        with_scale(f"{UP}_scale_inv", lambda one: one[:-1].clone()),
        r"has the shape \[5, 2\]: with wei",
    ),
    "turned": (
        "qwen3",
        BLOCKS,
        with_scale(f"{UP}_scale_inv", lambda one: one.T.contiguous()),
        r"needs \[6, 2\]: download",
    ),
    "other blocks": ("qwen3", BLOCKS | {"weight_block_size": [128, 128]}, lambda s: None, r"needs \[1, 1\]: download"),
    "blocks": (
        "qwen3",
        BLOCKS | {"weight_block_size": [8]},
        lambda s: None,
        r"weight_block_size=\[8\] is not possible",
    ),
    "no parts": (
        "ministral3",
        TENSORS,
        with_scale(f"{UP}_scale_inv", lambda one: one.repeat(7, 1)),
        "one for each of equal",
    ),
    "nan": (
        "qwen3",
        BLOCKS,
        with_scale(f"{UP}_scale_inv", lambda one: spoilt(one, NAN)),
        f"{UP}_scale_inv holds numbers that",
    ),
    "inf": ("ministral3", TENSORS, with_scale(f"{UP}_scale_inv", lambda one: spoilt(one, INF)), "that are not finite"),
    "type": (
        "qwen3",
        BLOCKS,
        with_scale(f"{UP}_scale_inv", torch.Tensor.int),
        "is of type I32: only F32, BF16, F16, F8_E8M0",
    ),
    "code": ("qwen3", BLOCKS, with_scale(UP, lambda one: spoilt(one, NAN)), f"{UP} holds codes of no number"),
    "too large": (
        "qwen3",
        BLOCKS,
        with_scale(f"{UP}_scale_inv", lambda one: spoilt(one, 3e38)),
        "too large for torch.bfloat16",
    ),
    "other type": (
        "qwen3",
        BLOCKS,
        lambda s: s.update({"x": torch.ones(2, 2).to(torch.float8_e5m2)}),
        "x is of type F8_E5M2",
    ),
    "vector": ("qwen3", BLOCKS, with_scale(UP, lambda one: one[0].clone()), "only matrices, and one for each expert"),
    "none": ("gpt_oss", BLOCKS, lambda s: None, "holds no tensor of fp8, though config.json says so"),
    "mxfp4 missing": (
        "gpt_oss",
        MXFP4,
        lambda s: s.pop(f"{STACK}_scales"),
        f"{STACK}_blocks is quantised, and its scales",
    ),
    "mxfp4 alone": (
        "gpt_oss",
        MXFP4,
        lambda s: s.pop(f"{STACK}_blocks"),
        f"{STACK}_scales belongs to a quantised tensor",
    ),
    "mxfp4 shape": (
        "gpt_oss",
        MXFP4,
        with_scale(f"{STACK}_scales", lambda one: one[:3].clone()),
        r"has the shape \[3, 32, 2\]",
    ),
    "mxfp4 blocks": (
        "gpt_oss",
        MXFP4,
        with_scale(f"{STACK}_blocks", lambda one: one[..., :8].clone()),
        "only .experts, outputs, ",
    ),
    "mxfp4 scale": (
        "gpt_oss",
        MXFP4,
        with_scale(f"{STACK}_scales", lambda one: spoilt(one, 255)),
        "that are not finite",
    ),
    "mxfp4 large": ("gpt_oss", MXFP4, with_scale(f"{STACK}_scales", lambda one: one.fill_(254)), "numbers too large"),
    "twice": (
        "gpt_oss",
        MXFP4,
        lambda s: s.update({STACK: torch.ones(1)}),
        f"holds {STACK} and {STACK}_blocks, and which",
    ),
    "method": (
        "qwen3",
        {"quant_method": "awq", "bits": 4},
        lambda s: None,
        "quantised by 'awq' are not read: only fp8 and mxfp4",
    ),
    "no method": ("qwen3", {"bits": 4}, lambda s: None, "quantised by None are not read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(folders, tmp_path, case):
    name, config, change, message = BAD[case]
    stored = tensors_of(folders / name)
    change(stored)
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, stored, config)
    with pytest.raises(ValueError, match=message):
        dequantize(str(tmp_path), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_fp16_and_no_folder(folders, tmp_path):
    with pytest.raises(ValueError, match="--dtype=fp16 is not for dequantize: use bf16 or fp32"):
        dequantize(str(folders / "qwen3"), str(tmp_path / "made"), options=ConversionOptions(dtype="fp16"))
    with pytest.raises(ValueError, match="nothing does not exist"):
        dequantize(str(tmp_path / "nothing"), str(tmp_path / "made"))
