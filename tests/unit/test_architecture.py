"""Rooms import earlier rooms only, and the page that draws them is true."""

import re
from pathlib import Path

import pytest

from tools.draw_imports import ORDER, PAGE, arrows_back, imports_of_rooms, main, mermaid

ROOT = Path(__file__).resolve().parents[2]


def test_no_room_imports_a_later_one():
    imports = imports_of_rooms()
    assert arrows_back(imports) == []
    assert set(imports) <= set(ORDER)


def test_contributing_states_this_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert " → ".join(f"`{room}`" for room in ORDER) in " ".join(text.split())


def test_selection_knows_nothing_of_megatron():
    for path in (ROOT / "megatron_sstoken" / "selection").glob("*.py"):
        assert "megatron.core" not in path.read_text(encoding="utf-8"), path


def test_only_parallel_reads_parallel_state():
    readers = [
        path.name
        for path in (ROOT / "megatron_sstoken").rglob("*.py")
        if path.name != "private_names.py" and "parallel_state." in path.read_text(encoding="utf-8")
    ]
    assert readers == ["parallel.py"]


def test_an_arrow_back_is_told(tmp_path):
    package = tmp_path / "megatron_sstoken"
    (package / "data").mkdir(parents=True)
    (package / "data" / "store.py").write_text("def f():\n    from megatron_sstoken.training.loop import train\n")
    (package / "attic.py").write_text("import megatron_sstoken.config\n")
    found = arrows_back(imports_of_rooms(package))
    assert found == ["attic has no place in ORDER", "data imports training, which comes later"]


def test_the_picture_is_of_these_imports(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.strip() in PAGE.read_text(encoding="utf-8"), "run tools/draw_imports.py --write"


def test_implied_arrows_are_left_out():
    picture = mermaid({"config": {"selection"}, "data": {"config", "selection"}})
    assert "config --> data" in picture and "selection --> data" not in picture


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_paths_that_documents_name_exist(document):
    """Paths in backquotes that begin with a room or a top-level folder."""
    text = (ROOT / document).read_text(encoding="utf-8")
    tops = {path.name for path in [*ROOT.iterdir(), *(ROOT / "megatron_sstoken").iterdir()]}
    named = [name for name in re.findall(r"`([\w./]+)`", text) if name.split("/")[0] in tops]
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "megatron_sstoken" / name).exists()]
    assert len(named) > 5 and missing == []
