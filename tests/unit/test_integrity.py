"""Checksums find every changed byte, also in themselves, and say which file it is in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.integrity import (
    CHECKSUMS,
    FileCheck,
    checksum_of,
    checksum_of_text,
    damage,
    differing,
    files_to_check,
    keep_stretches,
    read_checksums,
    read_stretches,
    stretch_of,
    write_checksums,
)
from tests.helpers.flip import flip_bit


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "sub" / "b").write_text("text ä")
    write_checksums(tmp_path, {name: checksum_of(tmp_path / name) for name in ("a", "sub/b")})
    return tmp_path


def test_the_algorithm_is_xxh3_128(tmp_path):
    (tmp_path / "empty").touch()
    # the published value for no bytes (xxHash's own test of its command line)
    assert checksum_of(tmp_path / "empty") == {"size": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}


def test_text_and_file_agree_and_bytes_are_counted(folder):
    counted = []
    assert checksum_of(folder / "sub" / "b", counted.append) == checksum_of_text("text ä")
    assert counted == [7]


def test_whole_files_pass(folder):
    assert damage(folder) == [] and set(read_checksums(folder)) == {"a", "sub/b"}


@given(place=st.integers(0, 8 * 256 * 50 - 1))
def test_every_flipped_bit_is_found(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("flip")
    (folder / "a").write_bytes(bytes(range(256)) * 50)
    write_checksums(folder, {"a": checksum_of(folder / "a")})
    flip_bit(folder / "a", place)
    (problem,) = damage(folder)
    assert problem == f"{folder / 'a'} is damaged: its bytes are not those that were written"


def test_missing_shortened_and_unreadable_files_are_told(folder):
    (folder / "a").write_bytes(b"123")
    (folder / "sub" / "b").unlink()
    assert [problem.removeprefix(f"{folder}/") for problem in damage(folder)] == [
        "a has 3 bytes, and had 12800 when it was written",
        "sub/b is missing",
    ]
    (folder / "sub" / "b").mkdir()
    (folder / "sub" / "b").rename(folder / "x")
    (folder / "a").unlink()
    assert len(differing(folder, {"a": read_checksums(folder)["a"]})) == 1


def test_no_flipped_bit_of_the_list_itself_passes(folder):
    whole = (folder / CHECKSUMS).read_bytes()
    for place in range(8 * len(whole)):
        flip_bit(folder / CHECKSUMS, place)
        assert damage(folder), f"bit {place}"
        (folder / CHECKSUMS).write_bytes(whole)


@pytest.fixture
def growing(tmp_path):
    """A file of 300 bytes that has two stretches so far, and half an entry that a kill has left."""
    values = bytes(range(100)) * 3
    (tmp_path / "values").write_bytes(values)
    stretches = [stretch_of(start, values[start:stop]) for start, stop in ((50, 200), (10, 20))]
    (tmp_path / "list").write_bytes(b"".join(one.tobytes() for one in stretches) + b"half")
    write_checksums(tmp_path, {"values": {"size": 300, "stretches": "list"}})
    return tmp_path


def test_of_a_file_that_grows_what_was_written_is_compared(growing):
    assert damage(growing) == [] and len(read_stretches(growing / "list")) == 2
    counted = []
    assert differing(growing, read_checksums(growing), counted.append) == [] and sum(counted) == 160
    for place, span in ((49, None), (50, (50, 200)), (199, (50, 200)), (200, None), (15, (10, 20)), (20, None)):
        flip_bit(growing / "values", 8 * place)
        told = [
            f"{growing / 'values'} is damaged: its bytes {one[0]} to {one[1]} are not those that were written"
            for one in [span]
            if one
        ]
        assert damage(growing) == told
        flip_bit(growing / "values", 8 * place)


def test_no_flipped_bit_of_a_list_of_stretches_passes(growing):
    for place in range(8 * 48):
        flip_bit(growing / "list", place)
        assert damage(growing), f"bit {place}"
        flip_bit(growing / "list", place)


def test_a_list_of_stretches_is_cut(growing):
    keep_stretches(growing / "list", 1)
    assert read_stretches(growing / "list")["start"].tolist() == [50] and (growing / "list").stat().st_size == 24


@pytest.mark.parametrize("name", ["../a", "/etc/hostname"])
def test_a_list_of_stretches_outside_the_folder_is_refused(growing, name):
    write_checksums(growing, {"values": {"size": 300, "stretches": name}})
    with pytest.raises(ValueError, match="damaged"):
        read_checksums(growing)


@pytest.mark.parametrize("name", ["../a", "/etc/hostname"])
def test_a_list_that_leads_out_of_its_folder_is_refused(folder, name):
    write_checksums(folder, {name: checksum_of(folder / "a")})
    with pytest.raises(ValueError, match="damaged"):
        read_checksums(folder)


def test_files_are_dealt_out_over_processes(folder):
    shares = [files_to_check("data.train", folder, "again", share=(rank, 2)) for rank in range(2)]
    assert [part.names for part in shares] == [("a",), ("sub/b",)]
    assert [part.size for part in shares] == [12800, 7]
    assert files_to_check("x", folder, "", wanted=lambda name: "/" in name).names == ("sub/b",)


def test_a_check_in_the_background_names_the_setting_and_the_remedy(folder):
    flip_bit(folder / "a", 77)
    check = FileCheck([files_to_check("data.train", folder, "prepare it again")], known=["one more"])
    assert check.wait() == [
        "one more",
        f"data.train: {folder / 'a'} is damaged: its bytes are not those that were written: prepare it again",
    ]


def test_a_folder_without_checksums_passes(tmp_path):
    (tmp_path / "a").touch()
    assert read_checksums(tmp_path) is None and damage(tmp_path) == []
    assert files_to_check("data.train", tmp_path, "").names == ()
