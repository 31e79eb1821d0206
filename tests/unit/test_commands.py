"""All programs by name."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from megatron_sstoken import __main__ as programs
from megatron_sstoken import __version__
from tests.helpers.cli import ROOT


def test_without_a_name_the_commands_are_listed(capsys):
    assert programs.main([]) == 0
    listed = capsys.readouterr().out
    for name, (_, about) in programs.commands().items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", listed, re.MULTILINE)
    for path in programs.OF_A_CHECKOUT:
        folder, names = path.rsplit("/", 1)
        assert all((ROOT / folder / name).is_file() for name in names.split(", "))


def test_each_has_a_main_that_takes_arguments():
    """Read from its source: importing all of them takes seconds."""
    for module, _ in programs.commands().values():
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
        (main,) = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == "main"]
        assert main.args.args[0].arg == "arguments" and len(main.args.args) == len(main.args.defaults)


def test_the_page_has_all_of_them():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(programs.COMMANDS)


def test_programs_that_are_started_by_a_module_of_ours_are_all_named():
    """Whatever can be started by `python -m megatron_sstoken.NAME`, or lies in tools/ as a wrapper, is a command, too."""
    package = ROOT / "megatron_sstoken"
    starts = 'if __name__ == "__main__":'
    found = {path.stem for path in package.glob("*.py") if starts in path.read_text(encoding="utf-8")}
    found |= {path.parent.name for path in package.glob("*/__main__.py")}
    assert found - {"__main__"} <= set(programs.commands())


def test_a_command_gets_its_arguments(tmp_path, capsys):
    assert programs.main(["make_config", "Llama-3.2-1B", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "config.json").is_file() and "no weights" in capsys.readouterr().out


def test_an_unknown_one_is_refused_with_the_likely_one(capsys):
    assert programs.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: trian is not a command: did you mean train? use one of prepare_data, "
    )


@pytest.mark.parametrize("asked", ["--version", "-V"])
def test_versions(asked, capsys):
    assert programs.main([asked]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith(f"megatron-sstoken {__version__}, megatron-core ")
        and "torch 2." in said
        and "Python 3." in said
    )
