"""Data files: how their tensors are saved and found again, and what a full disk does is told as the system says it."""

import errno
import io
import math
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from megatron_sstoken.conversion import torch_dist
from megatron_sstoken.conversion.torch_dist import (
    _first_of_block,
    _place_in,
    _without_bytes,
    _WithoutBytes,
    without_zip_checksums,
    write_objects,
)
from megatron_sstoken.conversion.work import run_tasks


class FullFile(io.BytesIO):
    name = "/place/__0_0.distcp"

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_an_error_of_the_system():
    """torch.save raises a RuntimeError of its own that says nothing of it."""
    item = SimpleNamespace(data=torch.zeros(1000), unique_key="a")
    with pytest.raises(OSError) as caught:
        write_objects(FullFile(), SimpleNamespace(objects=[item]))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, FullFile.name)


def saved(tensor: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("told_by", ["the meta device", "FakeTensorMode"])
def test_the_bytes_of_a_saved_tensor_are_where_they_are_said_to_be(monkeypatch, told_by):
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    if told_by == "FakeTensorMode":  # as torch that says nothing of it for the meta device
        load = torch.load

        def silent(view, map_location=None, **rest):
            if map_location == "meta":
                return torch.empty(7, 5, dtype=torch.bfloat16, device="meta")
            return load(view, map_location=map_location, **rest)

        monkeypatch.setattr(torch_dist.torch, "load", silent)
    file = saved(tensor)
    found, start = _without_bytes(file)
    assert (found.shape, found.dtype, found.is_contiguous()) == (tensor.shape, tensor.dtype, True)
    data = bytearray(file.getvalue()[start : start + tensor.nbytes])
    assert torch.equal(torch.frombuffer(data, dtype=torch.bfloat16).reshape(7, 5), tensor)


def test_without_zip_checksums_torch_reads_the_same_and_saves_as_before_afterwards():
    tensor = torch.arange(1000.0)
    with pytest.raises(KeyError), without_zip_checksums():
        bare = saved(tensor)
        raise KeyError
    assert torch.equal(torch.load(bare, weights_only=True), tensor)
    assert zipfile.ZipFile(bare).testzip() is not None  # no checksum was computed
    assert zipfile.ZipFile(saved(tensor)).testzip() is None


def test_workers_save_without_zip_checksums():
    files = []
    with without_zip_checksums():
        run_tasks(lambda tensor, check: files.append(saved(tensor)), [torch.arange(1000.0)] * 2, workers=2)
    assert [zipfile.ZipFile(file).testzip() is not None for file in files] == [True, True]


def test_a_tensor_is_saved_around_its_bytes():
    """What torch.save writes, but for the bytes, whose place is known; other records are as they are."""
    tensor = torch.arange(300, dtype=torch.bfloat16).reshape(20, 15)
    file = io.BytesIO()
    file.name = "file"
    with without_zip_checksums():
        around = _WithoutBytes(file, tensor)
        torch.save(tensor, around)
        whole = saved(tensor).getvalue()
    assert around.place is not None
    start, stop = around.place, around.place + tensor.nbytes
    assert file.getvalue() == whole[:start] + bytes(tensor.nbytes) + whole[stop:]
    assert whole[start:stop] == bytes(tensor.view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize(
    ("offsets", "lengths", "shape", "first"),
    [
        ((2, 0), (3, 4), (9, 4), 8),  # rows
        ((0, 0), (9, 4), (9, 4), 0),
        ((1, 2, 0), (1, 3, 4), (2, 9, 4), 44),  # rows of one layer
        ((1, 2, 1), (1, 1, 2), (2, 9, 4), 45),  # a part of one row
        ((5,), (2,), (9,), 5),
        ((), (), (), 0),
        ((0, 1), (9, 2), (9, 4), None),  # columns
        ((0, 2, 0), (2, 3, 4), (2, 9, 4), None),  # rows of two layers
    ],
)
def test_blocks_whose_elements_lie_one_after_another(offsets, lengths, shape, first):
    assert _first_of_block(offsets, lengths, shape) == first
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    block = numbers[tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))]
    found = block.flatten().tolist()
    assert (found == list(range(found[0], found[0] + len(found)))) == (first is not None)
    assert first is None or found[0] == first


def test_parts_of_a_tensor_are_found_in_it():
    whole = torch.empty(4, 6, dtype=torch.bfloat16)
    assert _place_in(whole[1:3], whole) == 12
    assert _place_in(whole.reshape(1, 4, 6)[:, 3:], whole) == 36
    assert _place_in(whole[:, 1:3], whole) is None  # not contiguous
    assert _place_in(torch.empty_like(whole), whole) is None  # not of it


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron's functions are compiled for a GPU")
def test_conversion_imports_what_it_needs():
    """transformers takes a second, and so does torch's compiler: each as long as it takes to convert 500 MB."""
    program = (
        "import sys, megatron_sstoken.commands.convert_checkpoint; from megatron.core.jit import jit_fuser;"
        "assert jit_fuser(len) is len; assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
