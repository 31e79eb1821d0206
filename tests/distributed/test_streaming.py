"""Conversion streams: bounded memory, the same bytes after a kill as without one, from checkpoints of any layout."""

import contextlib
import io
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_sstoken.checkpoint.manifest import RunIdentity, RunState, open_checkpoint
from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_sstoken.conversion import hf
from megatron_sstoken.conversion.contents import checkpoint_contents
from megatron_sstoken.conversion.folder import FolderReader
from megatron_sstoken.conversion.hf import from_hf, reshard, to_hf
from megatron_sstoken.conversion.inspection import describe_checkpoint, format_description
from megatron_sstoken.conversion.runs import RunCopier
from megatron_sstoken.conversion.torch_dist import CheckpointReader
from megatron_sstoken.conversion.work import ConversionOptions, Workplace
from megatron_sstoken.model.families import Architecture
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_settings

FAMILIES = ("llama", "qwen2")
SMALL_FILES = ConversionOptions(shard_size=50_000, workers=2)
IDENTITY = RunIdentity("data", 128, "truncate", True, True, 1, 8)
LARGE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 4}
BOUND = (
    90_000_000  # the large model takes 190 MB; its largest parameter of 25 MB takes 88 MB to convert into another type
)
COPIED = 30_000_000  # two buffers of 4 MB, and what threads take


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, as the library reads them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names that are not in both, or whose bits or types differ."""
    common = first.keys() & second.keys()
    unequal = [one for one in common if first[one].dtype != second[one].dtype or not first[one].equal(second[one])]
    return sorted((first.keys() ^ second.keys()) | set(unequal))


def kill_in_the_middle(rank: int, function: str, arguments: list[str]) -> None:
    """Convert and die, with one file complete and others begun."""
    add = Workplace.add

    def add_then_die(self, name, descriptor, record):
        if self._manifest.is_file():  # another thread may have noted its file, and be about to write that down
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, name, descriptor, record)

    Workplace.add = add_then_die
    getattr(hf, function)(*arguments, options=SMALL_FILES)


def peak_growth(function, *arguments, **options) -> int:
    """Bytes by which resident memory, mapped pages included, grew at its peak during a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    function(*arguments, **options)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def save_training_checkpoints(rank: int, folder: Path) -> list[str]:
    """On two processes: save with optimizer from tensor and pipeline layouts; load conversions on both.

    Returns the names of parameters that a conversion loads otherwise than the Hugging Face folder.
    """
    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.optimizer import build_optimizer
    from megatron_sstoken.parallel import create_layout, reset_layout

    wrong = []
    for family in FAMILIES:
        for name in ("tensor", "pipeline"):
            source = str(folder / family)
            settings = make_settings(source, "", **{f"parallel__{name}": 2})
            layout = create_layout(settings.parallel, seed=1)
            model = build_model(read_architecture(source), settings, layout, trainable=True)
            load_weights(model, source)
            expected = {key: value.detach().clone() for key, value in model.unwrapped[0].named_parameters()}
            for value in model.unwrapped[0].parameters():
                value.data.zero_()
            load_checkpoint(open_checkpoint(str(folder / f"{family}-fp32-megatron")), model)
            loaded = dict(model.unwrapped[0].named_parameters())
            wrong += [f"{family} {name} {key}" for key in expected if not torch.equal(expected[key], loaded[key])]
            optimizer, scheduler = build_optimizer(model, settings.optimizer, 10)
            state = RunState(3, IDENTITY, source)
            save_checkpoint(str(folder / f"{family}-{name}"), state, model, optimizer, scheduler, keep=0)
            reset_layout()
    return wrong


def convert_both_ways(rank: int, folder: Path) -> None:
    for family in FAMILIES:
        for dtype in ("fp32", "bf16"):
            source, name = folder / (family if dtype == "fp32" else f"{family}-bf16"), f"{family}-{dtype}"
            from_hf(str(source), str(folder / f"{name}-megatron"), options=SMALL_FILES)
            to_hf(str(folder / f"{name}-megatron"), str(folder / f"{name}-back"), options=SMALL_FILES)


def convert_more(rank: int, folder: Path) -> dict:
    """Everything that needs one process and has nothing to do with the layout it came from."""
    found: dict = {}
    megatron, back = folder / "llama-fp32-megatron", folder / "llama-fp32-back"
    before = os.stat(folder / "killed-hf.partial" / "content" / complete_file(folder / "killed-hf")).st_ino
    from_hf(str(folder / "llama"), str(folder / "killed-megatron"), options=SMALL_FILES)
    to_hf(str(megatron), str(folder / "killed-hf"), options=SMALL_FILES)
    found["went_on"] = before in {path.stat().st_ino for path in (folder / "killed-hf").iterdir()}
    found["resumed"] = [
        read_files(folder / f"killed-{name}") == read_files(whole)
        for name, whole in (("megatron", megatron), ("hf", back))
    ]
    for family in FAMILIES:
        for layout in ("tensor", "pipeline"):
            to_hf(str(folder / f"{family}-{layout}"), str(folder / f"{family}-{layout}-hf"), options=SMALL_FILES)
    reshard(str(folder / "llama-tensor"), str(folder / "resharded"), vocabulary_multiple=1)
    to_hf(str(folder / "resharded"), str(folder / "resharded-hf"))
    bf16 = ConversionOptions(dtype="bf16")
    reshard(str(folder / "llama-tensor"), str(folder / "resharded-bf16"), vocabulary_multiple=64, options=bf16)
    to_hf(str(folder / "resharded-bf16"), str(folder / "resharded-bf16-hf"))
    make_model(folder / "huge")
    huge = {name: tensor * 1e6 for name, tensor in read_weights(folder / "llama").items()}
    save_file(huge, folder / "huge" / "model.safetensors", metadata={"format": "pt"})
    from_hf(str(folder / "huge"), str(folder / "huge-megatron"))
    found["fp16"] = error_of(
        to_hf, str(folder / "huge-megatron"), str(folder / "fp16"), options=ConversionOptions(dtype="fp16")
    )
    found["memory"] = error_of(
        from_hf, str(folder / "llama"), str(folder / "none"), options=ConversionOptions(max_memory=20_000)
    )
    found["other"] = error_of(to_hf, str(megatron), str(folder / "none"), hf_path=str(folder / "qwen2"))
    found["cut"] = error_of(to_hf, str(cut_off(folder, megatron)), str(folder / "none"))
    make_model(folder / "large", **LARGE)
    bound = ConversionOptions(max_memory=BOUND, shard_size=60_000_000)
    found["copied"] = [
        peak_growth(from_hf, str(folder / "large"), str(folder / "large-megatron"), options=bound),
        peak_growth(to_hf, str(folder / "large-megatron"), str(folder / "large-back"), options=bound),
    ]
    bound = replace(bound, dtype="bf16")
    found["growth"] = [
        peak_growth(from_hf, str(folder / "large"), str(folder / "large-bf16-megatron"), options=bound),
        peak_growth(to_hf, str(folder / "large-megatron"), str(folder / "large-bf16-back"), options=bound),
    ]
    readers = {
        "folder": FolderReader(str(folder / "llama")),
        "conversion": CheckpointReader(megatron / "step_0000000"),
        "tensor": CheckpointReader(open_checkpoint(str(folder / "llama-tensor")).folder),
    }
    found["runs"] = {
        name: compare_runs(reader, readers["folder"].architecture, folder / "runs") for name, reader in readers.items()
    }
    return found


def compare_runs(reader: FolderReader | CheckpointReader, architecture: Architecture, scratch: Path) -> list[str]:
    """Parameters whose bytes do not lie together in files, after checking that those of all others are what is read."""
    apart = []
    with RunCopier(1000) as copier:
        for parameter in checkpoint_contents(architecture).parameters:
            runs = reader.runs(parameter, torch.float32)
            assert reader.runs(parameter, torch.bfloat16) is None, "of another type"
            if runs is None:
                apart.append(parameter.name)
                continue
            with open(scratch, "w+b") as file:
                copier.copy(runs, file.fileno(), 0)
                assert file.read() == reader.read(parameter).numpy().tobytes(), parameter.name
    return apart


def complete_file(output: Path) -> str:
    """A file that a stopped conversion noted as complete."""
    partial = output.with_name(output.name + ".partial")
    return min(json.loads((partial / "manifest.json").read_text())["files"])


def cut_off(folder: Path, megatron: Path) -> Path:
    """A copy of a checkpoint whose largest file lacks its end."""
    shutil.copytree(megatron, folder / "cut")
    path = max((folder / "cut" / "step_0000000").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 100)
    return folder / "cut"


def error_of(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("streaming")
    for number, family in enumerate(FAMILIES):
        make_model(path / family, family, seed=number)
        make_model(path / f"{family}-bf16", family, seed=number, dtype="bfloat16")
    run_distributed(convert_both_ways, 1, path)
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict:
    """What more conversions left and said, after two of them were killed."""
    jobs = [
        ("from_hf", [str(folder / "llama"), str(folder / "killed-megatron")]),
        ("to_hf", [str(folder / "llama-fp32-megatron"), str(folder / "killed-hf")]),
    ]
    with ThreadPoolExecutor() as pool:
        kills = [pool.submit(run_distributed, kill_in_the_middle, 1, *job) for job in jobs]
    for kill in kills:
        with pytest.raises(AssertionError, match="exit code -9"):
            kill.result()
    result = {
        "left": sorted(path.name for path in folder.glob("killed-*")),
        "loaded": run_distributed(save_training_checkpoints, 2, folder),
    }
    return result | run_distributed(convert_more, 1, folder)[0]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(folder, family, dtype):
    source, back = folder / (family if dtype == "fp32" else f"{family}-bf16"), folder / f"{family}-{dtype}-back"
    before = read_weights(source)
    assert {str(tensor.dtype) for tensor in before.values()} == {
        "torch.float32" if dtype == "fp32" else "torch.bfloat16"
    }
    assert differing(before, read_weights(back)) == []
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_shards_are_small_and_indexed(folder):
    back = folder / "llama-fp32-back"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    held = {}
    for path in back.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
        assert path.stat().st_size < SMALL_FILES.shard_size + 3000, "tensors of at most shard_size, and the header"
    assert index["weight_map"] == held
    assert len(set(held.values())) > 2
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in read_weights(back).values())


def test_a_killed_conversion_looks_incomplete_and_goes_on_to_the_same_bytes(found):
    assert found["left"] == ["killed-hf.partial", "killed-megatron.partial"]
    assert found["resumed"] == [True, True]
    assert found["went_on"], "a file that was complete should not have been written again"


def test_conversions_load_on_tensor_and_pipeline_layouts(found):
    assert found["loaded"] == [[], []]


@pytest.mark.parametrize("layout", ("tensor", "pipeline"))
@pytest.mark.parametrize("family", FAMILIES)
def test_training_checkpoints_export_bit_identically(folder, found, family, layout):
    assert describe_checkpoint(str(folder / f"{family}-{layout}"))["optimizer"]
    assert differing(read_weights(folder / family), read_weights(folder / f"{family}-{layout}-hf")) == []


def test_reshard_changes_padding_and_type_alone(folder, found):
    rows = {name: describe_checkpoint(str(folder / name)) for name in ("llama-tensor", "resharded", "resharded-bf16")}
    sizes = {name: one["tensors"] for name, one in rows.items()}
    heads = {name: [t for t in tensors if t["name"] == "output_layer.weight"] for name, tensors in sizes.items()}
    assert [heads[name][0]["shape"][0] for name in heads] == [128, 99, 128]
    assert [one["optimizer"] for one in rows.values()] == [True, False, False]
    assert differing(read_weights(folder / "llama"), read_weights(folder / "resharded-hf")) == []
    rounded = {name: tensor.bfloat16() for name, tensor in read_weights(folder / "llama").items()}
    assert differing(rounded, read_weights(folder / "resharded-bf16-hf")) == []


def test_bytes_of_parameters_are_found_in_files(found):
    """Whole rows are; a checkpoint of two tensor ranks holds some matrices by columns."""
    assert found["runs"]["folder"] == found["runs"]["conversion"] == []
    ends = {name.partition(".layers.")[2].partition(".")[2] for name in found["runs"]["tensor"]}
    assert ends == {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}


def test_memory_stays_below_the_bound(folder, found):
    assert differing(read_weights(folder / "large"), read_weights(folder / "large-back")) == []
    assert sum(one.nbytes for one in read_weights(folder / "large").values()) > 2 * BOUND
    others = 16_000_000  # what is no tensor: the model on the meta device, threads, malloc
    assert max(found["growth"]) < BOUND + others, found["growth"]
    assert max(found["copied"]) < COPIED, found["copied"]


def test_what_does_not_fit_is_named(folder, found):
    assert "has values that fp16 cannot hold" in found["fp16"]
    assert "--max_memory=20 KB is too small: converting the largest tensor, " in found["memory"]
    assert "made from a model of another architecture" in found["other"]
    assert "is missing or cut off" in found["cut"]
    assert not (folder / "none").exists() and not (folder / "none.partial").exists()


def test_inspect_tells_numbers(folder, found):
    description = describe_checkpoint(str(folder / "qwen2-tensor"))
    assert (description["step"], description["made_by"], description["source"]) == (
        3,
        "training",
        str(folder / "qwen2"),
    )
    assert description["split"] == {"tensor": 2, "pipeline": 1, "device": "cpu"}
    padding = (128 - 99) * 32
    assert description["parameters"] == sum(one.numel() for one in read_weights(folder / "qwen2").values()) + padding
    assert "decoder.layers.mlp.linear_fc2.weight" in format_description(description)
    assert describe_checkpoint(str(folder / "qwen2-fp32-megatron"))["made_by"] == "conversion"


def run_tool(*arguments: str) -> tuple[int, str]:
    """Exit code and what the program says on standard error."""
    from megatron_sstoken.commands.convert_checkpoint import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(list(arguments)), said.getvalue()


def test_wrong_input_ends_with_one_clear_line(folder, tmp_path):
    broken = {name: tmp_path / name for name in ("no_config", "missing_tensor", "truncated")}
    for path in broken.values():
        shutil.copytree(folder / "llama-fp32-back", path)
    (broken["no_config"] / "config.json").unlink()
    index = broken["missing_tensor"] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    shard = min(broken["truncated"].glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    out = str(tmp_path / "out")
    cases = {
        ("from-hf", "--hf", str(broken["no_config"])): "has no config.json",
        ("from-hf", "--hf", str(broken["missing_tensor"])): "the index is stale: it does not name model.norm.weight",
        ("from-hf", "--hf", str(broken["truncated"])): "is not a readable safetensors file",
        ("from-hf", "--hf", str(folder / "llama"), "--dtype", "int4"): "--dtype=int4 is unknown: use fp32, bf16, fp16",
        ("from-hf", "--hf", str(folder / "llama"), "--max_memory", "much"): "'much' is not a size",
        ("to-hf", "--checkpoint", str(tmp_path)): "holds no complete checkpoint",
    }
    for arguments, message in cases.items():
        code, said = run_tool(*arguments, "--output", out)
        assert (code, said.count("\n")) == (2, 1) and said.startswith("error: ") and message in said, (arguments, said)
    code, said = run_tool("to-hf", "--checkpoint", str(folder / "llama-fp32-megatron"), "--output", str(tmp_path))
    assert code == 2 and "exists: name another --output, or pass --overwrite" in said
    assert not Path(out).exists() and not Path(out + ".partial").exists()


def test_two_conversions_do_not_write_one_output(tmp_path):
    with Workplace(str(tmp_path / "out"), {"number": 1}):
        errors = []
        other = threading.Thread(
            target=lambda: errors.append(error_of(Workplace, str(tmp_path / "out"), {"number": 1}))
        )
        other.start()
        other.join()
    assert "another conversion is writing it" in errors[0]
