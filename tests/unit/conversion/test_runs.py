"""Bytes found by number and copied: the same as those of the tensors that are put together in memory."""

import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.conversion.runs import NumberedRows, Run, RunCopier, cut

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def held(runs) -> list[tuple]:
    """Each byte of some runs, by file and place."""
    return [(run.path, run.start + index) for run in runs for index in range(run.length)]


@given(lengths=LENGTHS, data=st.data())
def test_a_cut_holds_the_bytes_between(lengths, data):
    runs = [Run(f"file{index}", 100 * index, length) for index, length in enumerate(lengths)]
    start = data.draw(st.integers(0, sum(lengths)))
    stop = data.draw(st.integers(start, sum(lengths)))
    found = list(cut(runs, start, stop))
    assert held(found) == held(runs)[start:stop]
    assert all(run.length > 0 for run in found)


@given(rows=LENGTHS, width=st.integers(1, 3), data=st.data())
def test_rows_in_any_order_are_the_bytes_of_their_numbers(rows, width, data):
    """A tensor lies in one run or in several, which need not end where rows do."""
    numbered, tensors, bytes_of = NumberedRows(), [], {0: [(None, index) for index in range(width)]}
    for index, count in enumerate(rows):
        whole = Run(f"file{index}", 10 * index, count * width)
        middle = data.draw(st.integers(0, whole.length))
        runs = [one for part in ((0, middle), (middle, whole.length)) for one in cut([whole], *part)]
        tensors.append(numbered.of([count, width], runs))
        for row, number in enumerate(tensors[-1].flatten().tolist()):
            bytes_of[number] = held([whole])[row * width : (row + 1) * width]
    assert len(bytes_of) == sum(rows) + 1  # no number stands for two rows
    order = data.draw(st.lists(st.sampled_from(sorted(bytes_of)), min_size=1, max_size=12))
    found = held(numbered.runs(torch.tensor(order)[:, None]))
    wanted = [byte for number in order for byte in bytes_of[number]]
    assert [path for path, _ in found] == [path for path, _ in wanted]
    assert [byte for byte in found if byte[0]] == [byte for byte in wanted if byte[0]]


def test_neighbours_are_one_run():
    numbered = NumberedRows()
    first, second = (numbered.of([4, 2], [Run(name, 0, 16)]) for name in "ab")
    assert numbered.runs(torch.cat([first, second])) == [Run("a", 0, 16), Run("b", 0, 16)]
    assert numbered.runs(torch.cat([first[2:], first[:1]])) == [Run("a", 8, 8), Run("a", 0, 4)]


@pytest.mark.parametrize("largest", [1, 7, 1 << 30])
def test_runs_are_copied_to_their_place(tmp_path, largest):
    """Through a buffer smaller than they are, or larger; what lies around stays."""
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(1000)
    source.write_bytes(content)
    target.write_bytes(b"." * 600)
    runs = [Run(str(source), 900, 100), Run(None, 0, 50), Run(str(source), 0, 300)]
    with open(target, "r+b") as file, RunCopier(largest) as copier:
        assert copier.cost == min(largest, 4 << 20)
        assert copier.copy(runs, file.fileno(), 20) == 450
    assert target.read_bytes() == b"." * 20 + content[900:] + bytes(50) + content[:300] + b"." * 130


def test_several_threads_copy_at_once(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(1 << 20)
    source.write_bytes(content)
    step = 1 << 17
    with open(target, "wb") as file, RunCopier(1 << 14) as copier:
        threads = [
            threading.Thread(target=copier.copy, args=([Run(str(source), start, step)], file.fileno(), start))
            for start in range(0, 1 << 20, step)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert target.read_bytes() == content


def test_a_file_that_has_become_shorter_is_told(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"0123")
    with (
        open(tmp_path / "target", "wb") as file,
        RunCopier(100) as copier,
        pytest.raises(ValueError, match="source has become shorter while it was read: start again"),
    ):
        copier.copy([Run(str(source), 2, 10)], file.fileno(), 0)
