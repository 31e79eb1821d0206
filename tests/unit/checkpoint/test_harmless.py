"""No code of a checkpoint runs: every pickle in it is compared with what may stand there."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_sstoken.checkpoint.harmless import missing_parts, read_metadata, require_harmless
from tests.helpers import cli
from tests.helpers.lines import CHECKPOINTS, SAVED

STEPS = [folder / "run" / f"step_{SAVED:07d}" for folder in sorted(CHECKPOINTS.iterdir())]


class Code:
    """Unpickling it makes the file `proof`."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture(params=STEPS, ids=lambda step: step.parents[1].name)
def step(request, tmp_path):
    return shutil.copytree(request.param, tmp_path / "step")


def test_real_checkpoints_are_read_as_torch_reads_them(step):
    found, expected = read_metadata(step), FileSystemReader(step).read_metadata()
    require_harmless(step, found)
    found.storage_meta = expected.storage_meta  # torch writes into it who reads
    assert found == expected and len(found.state_dict_metadata) > 30
    assert missing_parts(step, read_metadata(step)) == []


@pytest.mark.parametrize("at", ["whole", "inside"])
def test_metadata_that_runs_code_is_refused(step, tmp_path, at):
    code = Code(tmp_path / "proof")
    content = code if at == "whole" else Metadata({"weight": code})
    (step / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"posix.mkdir, which has no place in it.*not to be trusted: name another"):
        read_metadata(step)
    assert not code.proof.exists()


def test_objects_that_run_code_are_refused(step, tmp_path):
    code = Code(tmp_path / "proof")
    metadata = read_metadata(step)
    torch.save(code, step / "__9_0.distcp")
    place = next(iter(metadata.storage_data.values()))
    size = (step / "__9_0.distcp").stat().st_size
    metadata.state_dict_metadata["random/shard_9"] = BytesStorageMetadata()
    index = MetadataIndex("random/shard_9")
    metadata.storage_data[index] = type(place)("__9_0.distcp", 0, size)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="random/shard_9 is damaged or not to be trusted"):
        require_harmless(step, read_metadata(step))
    metadata.storage_data[index] = type(place)("../outside", 0, size)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names \.\./outside, which is not in that folder"):
        read_metadata(step)
    assert not code.proof.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_damaged_metadata(step, content):
    (step / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read .* so it is damaged"):
        read_metadata(step)


def test_files_that_are_gone_or_short_are_named(step):
    data = sorted(step.glob("*.distcp"))
    os.truncate(data[-1], data[-1].stat().st_size - 1)
    assert missing_parts(step, read_metadata(step)) == [data[-1].name]
    data[0].unlink()
    assert missing_parts(step, read_metadata(step)) == sorted({data[0].name, data[-1].name})


@pytest.mark.parametrize(
    "command",
    [pytest.param("inspect", marks=pytest.mark.slow), "to-hf", pytest.param("reshard", marks=pytest.mark.slow)],
)
def test_the_programs_run_none_of_it(step, tmp_path, command):
    code = Code(tmp_path / "proof")
    (step / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": code})))
    more = (
        [] if command == "inspect" else ["--output", str(tmp_path / "out"), "--hf", str(STEPS[0].parents[1] / "model")]
    )
    program = str(cli.ROOT / "tools" / "convert_checkpoint.py")
    result = cli.run([sys.executable, program, command, "--checkpoint", str(step), *more])
    assert result.returncode == 2 and "not to be trusted" in result.stderr and not code.proof.exists()
