"""Sizes, the memory budget, workers and the partial folder."""

import os
import threading

import pytest

from megatron_sstoken.conversion.work import (
    ConversionOptions,
    MemoryBudget,
    Workplace,
    check_memory,
    parse_bytes,
    refuse_existing,
    run_tasks,
)
from megatron_sstoken.files import format_bytes
from megatron_sstoken.integrity import checksum_of


def test_sizes():
    sizes = ("2GB", "1.5GiB", "500 mb", "7", "7B", "3KB")
    assert [parse_bytes(text) for text in sizes] == [2 * 10**9, 3 * 2**29, 5 * 10**8, 7, 7, 3000]
    assert [format_bytes(size) for size in (7, 1500, 2 * 10**9)] == ["7 B", "1.5 KB", "2 GB"]
    for text in ("", "GB", "many", "1e999GB", "nan"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_bytes(text)


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"workers": 0}, {"max_memory": 0}, {"shard_size": -1}])
def test_options_refuse_what_cannot_be(change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))}="):
        ConversionOptions(**change)


def test_the_largest_tensor_must_fit():
    check_memory(10, {"small": 1, "large": 10})
    with pytest.raises(
        ValueError, match="--max_memory=9 B is too small: converting the largest tensor, large, takes 10 B"
    ):
        check_memory(9, {"small": 1, "large": 10})


def test_workers_never_hold_more_than_the_budget():
    budget, guard, held, most = MemoryBudget(10), threading.Lock(), 0, 0

    def work(size, check):
        nonlocal held, most
        with budget.hold(size):
            with guard:
                held += size
                most = max(most, held)
            threading.Event().wait(0.002)
            with guard:
                held -= size

    run_tasks(work, [4, 7, 3, 10, 1, 6, 5] * 5, workers=4)
    assert held == 0 and 7 <= most <= 10


def test_one_failure_stops_the_others():
    started = []

    def work(number, check):
        check()
        started.append(number)
        if number == 3:
            raise ValueError("three")
        threading.Event().wait(0.001)

    with pytest.raises(ValueError, match="three"):
        run_tasks(work, range(1000), workers=2)
    assert len(started) < 1000


def write(place: Workplace, name: str, content: bytes) -> None:
    with open(place.folder / name, "wb") as file:
        file.write(content)
        file.flush()
        place.add(name, file.fileno(), {})


def test_complete_files_are_kept_and_all_others_deleted(tmp_path):
    output = tmp_path / "out"
    with Workplace(str(output), {"dtype": "fp32"}) as place:
        write(place, "whole", b"12345")
        write(place, "short", b"12345")
        os.truncate(place.folder / "short", 3)
        (place.folder / "half").write_bytes(b"123")
    with Workplace(str(output), {"dtype": "fp32"}) as place:
        assert place.complete == {"whole": {"size": 5, "checksum": checksum_of(place.folder / "whole")}}
        assert [path.name for path in place.folder.iterdir()] == ["whole"]
    with Workplace(str(output), {"dtype": "bf16"}) as place:
        assert place.complete == {} and list(place.folder.iterdir()) == []


def test_publishing_replaces_the_output_and_leaves_nothing_beside_it(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_bytes(b"old")
    with Workplace(str(output), {}) as place:
        write(place, "new", b"new")
        assert [path.name for path in output.iterdir()] == ["old"]
        place.publish()
    assert sorted(path.name for path in output.iterdir()) == ["checksums.json", "conversion.json", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_the_work(tmp_path):
    with (
        Workplace(str(tmp_path / "out"), {}) as place,
        pytest.raises(ValueError, match="GB free, the output takes 1e"),
    ):
        place.require_space(10**18)


def converted(folder):
    """An output of a conversion."""
    with Workplace(str(folder), {}) as place:
        write(place, "model.safetensors", b"new")
        place.publish()
    return folder


def test_overwrite_replaces_what_a_conversion_made(tmp_path):
    output = converted(tmp_path / "out")
    refuse_existing(str(output), True, [str(tmp_path / "source")])
    with pytest.raises(ValueError, match="exists: name another --output, or pass --overwrite"):
        refuse_existing(str(output), False, [])
    (output / "model.safetensors").unlink()  # less is no loss
    refuse_existing(str(output), True, [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "out").mkdir(), "it has no conversion.json"),
        (lambda folder: (folder / "out").write_text("mine"), "it is not a folder"),
        (lambda folder: (folder / "out").symlink_to(converted(folder / "other")), "it is not a folder"),
        (lambda folder: (folder / "out").symlink_to(folder / "nothing"), "it is not a folder"),
        (lambda folder: (converted(folder / "out") / "step_0000005").mkdir(), None),
        (
            lambda folder: (converted(folder / "out") / "mine.txt").write_text("mine"),
            "mine.txt is not of the conversion",
        ),
    ],
)
def test_overwrite_replaces_nothing_else(tmp_path, make, message):
    make(tmp_path)
    output = str(tmp_path / "out")
    if message is None:
        refuse_existing(output, True, [])  # an empty folder is nothing
        return
    with pytest.raises(ValueError, match=f"--overwrite does not replace .*{message}.*or remove it yourself"):
        refuse_existing(output, True, [])


@pytest.mark.parametrize("output", ["models/llama", "models", "link", "models/llama/../llama"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_is_never_replaced(tmp_path, output, overwrite):
    converted(tmp_path / "models" / "llama")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    with pytest.raises(ValueError, match="is, or holds, what is read"):
        refuse_existing(str(tmp_path / output), overwrite, [str(tmp_path / "models" / "llama")])
