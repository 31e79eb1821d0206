"""Files of weights as they are found: pickled ones, stale indexes, missing and doubled parts, quantised tensors."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights, NoWeights
from megatron_sstoken.model.weights import check_weights
from tests.helpers.workbench import load_model, make_model

INDEX = "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Llama in one file and in several, and Qwen2, whose head is tied."""
    folder = tmp_path_factory.mktemp("made")
    for family in ("llama", "qwen2"):
        make_model(folder / family, family)
    load_model(folder / "llama").save_pretrained(folder / "sharded", max_shard_size="60KB")
    return folder


@pytest.fixture
def sharded(made, tmp_path) -> Path:
    """A copy of the model in several files, to be changed."""
    return Path(shutil.copytree(made / "sharded", tmp_path / "model"))


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def change_index(folder: Path, change) -> None:
    names = index_of(folder)
    change(names)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def change_file(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def problem_of(folder: Path) -> str:
    """What `check_weights` says of a folder; the programs that convert and verify say the same, and end with code 2."""
    with pytest.raises(ValueError) as error:
        check_weights(HuggingFaceWeights(str(folder)), read_architecture(str(folder)))
    return str(error.value)


def assert_programs_say(problem: str, folder: Path, tmp_path: Path, capsys) -> None:
    for arguments in (["from-hf", f"--hf={folder}", f"--output={tmp_path / 'out'}"], ["verify", f"--hf={folder}"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"error: {problem}\n"
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_another_file(sharded, tmp_path, capsys):
    first, second = sorted(set(index_of(sharded).values()))[:2]
    real = index_of(sharded)[NORM]
    wrong = first if real != first else second
    change_index(sharded, lambda names: names.update({NORM: wrong}))
    problem = problem_of(sharded)
    assert problem == f"{sharded}: the index is stale: {NORM} is not in {wrong} but in {real}: download the model again"
    assert_programs_say(problem, sharded, tmp_path, capsys)


def test_an_index_that_names_what_is_nowhere(sharded):
    change_file(sharded / index_of(sharded)[NORM], lambda tensors: tensors.pop(NORM))
    assert f"the index is stale: {NORM} is not in model-" in problem_of(sharded)


def test_an_index_that_misses_tensors(sharded):
    """Left out by the index, a tensor would be left out of the model."""
    where = index_of(sharded)[NORM]
    change_index(sharded, lambda names: names.pop(NORM))
    assert problem_of(sharded) == (
        f"{sharded}: the index is stale: it does not name {NORM}, which lies in {where}: download the model again"
    )


def test_a_tensor_in_two_files(sharded, tmp_path, capsys):
    other = next(name for name in set(index_of(sharded).values()) if name != index_of(sharded)[NORM])
    change_file(sharded / other, lambda tensors: tensors.update({NORM: torch.ones(32)}))
    problem = problem_of(sharded)
    assert re.search(f"{NORM} lies in model-.* and in model-.*, and which one counts is not told: download", problem)
    assert_programs_say(problem, sharded, tmp_path, capsys)


def test_missing_files_are_all_named(sharded, tmp_path, capsys):
    files = sorted(set(index_of(sharded).values()))
    for name in files[:2]:
        (sharded / name).unlink()
    problem = f"{sharded}: {files[0]}, {files[1]}, named by {INDEX}, are missing: download the model again"
    assert_programs_say(problem, sharded, tmp_path, capsys)


def test_of_the_hubs_cache_the_name_is_told(made, tmp_path):
    folder = shutil.copytree(made / "sharded", tmp_path / "models--meta--Llama-1B" / "snapshots" / "a1")
    Path(folder, index_of(folder)[NORM]).unlink()
    with pytest.raises(ValueError, match="is missing: download the model with `hf download meta/Llama-1B`"):
        HuggingFaceWeights(str(folder))


def test_files_without_their_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(
        NoWeights, match=r"has model-00001-of-0000\d.safetensors, .* but no model.safetensors.index.json: down"
    ):
        HuggingFaceWeights(str(sharded))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is not an index of tensors .*: download the model again"):
        HuggingFaceWeights(str(sharded))


def test_beside_a_whole_file_an_index_is_not_heeded(made, sharded):
    """As in transformers; the rest of an older model, whose files need not be there."""
    shutil.copy(made / "llama" / "model.safetensors", sharded)
    change_index(sharded, lambda names: names.update({NORM: "gone.safetensors"}))
    assert HuggingFaceWeights(str(sharded)).files() == [str(sharded / "model.safetensors")]


@pytest.mark.parametrize("in_parts", [False, True])
def test_pickled_files_are_read(made, tmp_path, in_parts):
    source = made / "llama"
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    if in_parts:
        names = sorted(tensors)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, held in parts.items():
            torch.save({name: tensors[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    weights, wanted = HuggingFaceWeights(str(folder)), HuggingFaceWeights(str(source))
    check_weights(weights, read_architecture(str(folder)))
    assert weights.names() == wanted.names() and len(weights.files()) == 1 + in_parts
    for name in weights.names():
        found = weights.slice(name)
        assert (found.get_dtype(), found.get_shape()) == (
            wanted.slice(name).get_dtype(),
            wanted.slice(name).get_shape(),
        )
        assert torch.equal(found[:], wanted.slice(name)[:])
    assert torch.equal(weights.slice(HEAD)[3:7, 1:], wanted.slice(HEAD)[3:7, 1:])
    assert "are pickled .bin files" in (weights.note() or "") and wanted.note() is None


def test_a_pickled_model_is_converted_and_the_note_told(made, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(made / "qwen2" / "config.json", folder)
    torch.save(load_model(made / "qwen2").state_dict(), folder / "pytorch_model.bin")  # with the tied head
    assert main(["from-hf", f"--hf={folder}", f"--output={tmp_path / 'out'}"]) == 0
    assert f"note: the weights of {folder} are pickled .bin files" in capsys.readouterr().out
    assert main(["verify", f"--hf={made / 'qwen2'}", f"--checkpoint={tmp_path / 'out'}"]) == 0


class _Runs:
    """An object whose unpickling would run a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"weight": torch.ones(2), "more": _Runs(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is not read: .*holds more than tensors, which are not unpickled: download"
    ):
        HuggingFaceWeights(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin does not hold tensors by name"):
        HuggingFaceWeights(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not read: it is damaged"):
        HuggingFaceWeights(str(tmp_path))


def test_quantised_weights_are_refused_in_conversion_and_training(made, tmp_path, capsys):
    folder = Path(shutil.copytree(made / "llama", tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    change_file(
        folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )
    problem = problem_of(folder)
    assert problem == (
        f"{folder}: {name} is of type F8_E4M3: only F32, BF16, F16 are read: name the folder of the BF16 weights "
        "(convert_checkpoint.py dequantize makes one of fp8 and mxfp4 alone)"
    )
    assert_programs_say(problem, folder, tmp_path, capsys)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    remedy = f"make a folder of BF16 weights with `python tools/convert_checkpoint.py dequantize --hf {folder} --output"
    with pytest.raises(ValueError, match=re.escape(f"weights quantised by 'fp8' are not read: {remedy}")):
        read_architecture(str(folder))
    with pytest.raises(
        ValueError, match=re.escape(f"{name} is of type F8_E4M3: only F32, BF16, F16 are read: {remedy}")
    ):
        HuggingFaceWeights(str(folder)).check_files()


def test_a_tied_head_is_compared_whole(made, tmp_path):
    """transformers does not tie a head that differs, were it in its last number."""
    folder = Path(shutil.copytree(made / "qwen2", tmp_path / "model"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    change_file(folder / "model.safetensors", lambda tensors: tensors.update({HEAD: embedding.clone()}))
    check_weights(HuggingFaceWeights(str(folder)), read_architecture(str(folder)))
    embedding[-1, -1] += 1e-3
    change_file(folder / "model.safetensors", lambda tensors: tensors.update({HEAD: embedding}))
    assert problem_of(folder) == (
        f"{folder}: {HEAD} differs from model.embed_tokens.weight, though config.json says tie_word_embeddings=true: write "
        "false there, for transformers then keeps both apart"
    )
    theirs = load_model(folder)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
