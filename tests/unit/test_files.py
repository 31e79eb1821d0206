"""What is published is whole; a failure leaves what was there."""

import os

import pytest

from megatron_sstoken.files import publish_folder, read_json, require_size, whole_folder, write_durably, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_durably(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_durably(path, "new")
    assert path.read_text() == "old"
    write_json(path, {"größe": 1})
    assert read_json(path) == {"größe": 1} and names(tmp_path) == ["notes.json"]


@pytest.mark.parametrize(("content", "reason"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_damaged_json_is_named(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json {reason}.*so it is damaged: delete the folder"):
        read_json(tmp_path / "a.json")


def test_sizes_are_required(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    require_size(tmp_path / "a", 2, "make it again")
    with pytest.raises(ValueError, match="a has 2 bytes instead of 3, so it is damaged: make it again"):
        require_size(tmp_path / "a", 3, "make it again")
    with pytest.raises(ValueError, match="b is missing: make it again"):
        require_size(tmp_path / "b", 3, "make it again")


def test_a_folder_appears_when_its_block_succeeds(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target, overwrite=False) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "new").write_text("new")
        assert not target.exists()
    assert names(tmp_path) == ["out"] and (target / "inner" / "new").read_text() == "new"


def test_a_failing_block_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError), whole_folder(tmp_path / "out", overwrite=True) as partial:
        partial.mkdir()
        raise KeyError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_only_overwriting_replaces(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    with pytest.raises(OSError):
        publish_folder(tmp_path / "new", tmp_path / "old", overwrite=False)
    assert names(tmp_path) == ["new", "old"]
    publish_folder(tmp_path / "new", tmp_path / "old", overwrite=True)
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == ["new"]


def test_a_file_in_the_way_is_replaced_too(tmp_path):
    (tmp_path / "out").write_text("a file")
    (tmp_path / "new").mkdir()
    publish_folder(tmp_path / "new", tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out").is_dir()
