"""How parameters are dealt out to data files."""

from types import SimpleNamespace

import torch

from megatron_sstoken.conversion.output import _data_files

MB = 1 << 20


def sizes(numbers: list[int], shard_size: int) -> list[int]:
    """Bytes of each data file of bf16 parameters with so many numbers."""
    parameters = [SimpleNamespace(name=f"p{index}", numel=numel) for index, numel in enumerate(numbers)]
    files = _data_files(SimpleNamespace(parameters=parameters), torch.bfloat16, shard_size)
    assert [one.name for group in files.values() for one in group] == [one.name for one in parameters]
    return [sum(2 * one.numel for one in group) for group in files.values()]


def test_a_small_model_has_files_for_several_workers():
    assert sizes([16 * MB] * 16, 2000 * MB) == [0, *[64 * MB] * 8]
    assert sizes([MB] * 4, 2000 * MB) == [0, 8 * MB]  # nothing below 64 MB is taken apart


def test_files_of_a_large_model_are_as_large_as_asked_for():
    assert sizes([500 * MB] * 64, 2000 * MB) == [0, *[2000 * MB] * 32]
    assert sizes([16 * MB] * 16, 32 * MB) == [0, *[32 * MB] * 16]
