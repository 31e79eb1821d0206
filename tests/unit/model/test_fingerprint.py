"""Names for weights: equal for equal files, different otherwise."""

import pytest

from megatron_sstoken.model.fingerprint import fingerprint_files

LARGE = (1 << 26) + (1 << 20)


@pytest.fixture
def files(tmp_path):
    """A function: write files with these contents under a new folder; their paths."""
    number = 0

    def write(contents: dict[str, bytes]) -> list[str]:
        nonlocal number
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return [str(folder / name) for name in contents]

    return write


def test_equal_files_in_other_folders_are_equal(files):
    contents = {"config.json": b"{}", "model.safetensors": b"\0\1" * 100}
    prints = {fingerprint_files(files(contents)) for _ in range(2)}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_every_change_shows(files):
    variants = [
        {"a": b"12", "b": b"3"},
        {"a": b"12", "b": b"4"},  # a byte
        {"a": b"1", "b": b"23"},  # a border
        {"a": b"12", "c": b"3"},  # a name
        {"a": b"12", "b": b"3", "c": b""},  # a file more
        {"b": b"3", "a": b"12"},  # the order
        {"a": b"12"},
        {},
    ]
    assert len({fingerprint_files(files(contents)) for contents in variants}) == len(variants)


def test_large_files_are_told_apart_by_samples_of_them(tmp_path):
    def changed(name: str, *offsets: int, size: int = LARGE) -> str:
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir()
        with open(path, "wb") as file:
            file.truncate(size)  # sparse: takes no space
            for offset in offsets:
                file.seek(offset)
                file.write(b"x")
        return fingerprint_files([str(path)])

    plain = changed("plain")
    assert plain == changed("same")
    prints = {
        plain,
        changed("header", 0),
        changed("end of the header", (1 << 20) - 1),
        changed("last byte", LARGE - 1),
        changed("training", *range(0, LARGE, 4096)),
        changed("longer", size=LARGE + 1),
    }
    assert len(prints) == 6


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint_files([str(tmp_path / "absent")])
