"""Every private name of others that we use is in the inventory, and is still there in what is installed."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest

import megatron_sstoken
from megatron_sstoken.private_names import PRIVATE_NAMES, PrivateName

PACKAGE = Path(megatron_sstoken.__file__).parent
THEIRS = ("megatron", "torch", "transformer_engine")
INVENTORY = "private_names.py"


def source_of(module: str) -> str:
    """The text of a module of theirs, which need not be importable here."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is gone"
    return Path(spec.origin).read_text(encoding="utf-8")


def speaks_of(tree: ast.AST, name: str) -> bool:
    """Whether an attribute, a variable, an imported name, a keyword or a string of a syntax tree is `name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            found = node.value
        else:
            fields = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name", ast.arg: "arg", ast.keyword: "arg"}
            found = getattr(node, fields.get(type(node), ""), None)
        if found == name:
            return True
    return False


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.module}.{entry.name}")
def test_the_name_exists(entry: PrivateName):
    if entry.only_with is not None and importlib.util.find_spec(entry.only_with) is None:
        pytest.skip(f"{entry.only_with} is not installed")
    if entry.in_text:
        assert speaks_of(ast.parse(source_of(entry.module)), entry.name), f"{entry.module} knows no {entry.name}"
    else:
        attrgetter(entry.name)(importlib.import_module(entry.module))


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.module}.{entry.name}")
def test_the_name_is_used_where_the_inventory_says(entry: PrivateName):
    assert entry.used_in and entry.why
    # TE's norm weight is the prefix of a longer name.
    word = entry.name.split(".")[-1].removesuffix("_weight")
    for file in entry.used_in:
        assert re.search(rf"\b{word}", (PACKAGE / file).read_text(encoding="utf-8")), f"{file} does not use it any more"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined_names(tree: ast.AST) -> set[str]:
    """Functions, classes, variables and attributes of `self` that a module of ours defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return found


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root_of(node: ast.AST) -> str | None:
    """The name that a chain of attributes and calls begins with; None where it begins with something else."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def private_names_used(tree: ast.AST) -> Iterator[str]:
    """Private names of others in a module of ours.

    Those of the standard library and of our own modules are left out, as far as an import tells; so is what the module
    defines itself and reaches through `self`. Whatever is left counts, for nobody can tell whose it is.
    """
    elsewhere = set()  # names bound to modules that are neither megatron's nor torch's nor Transformer Engine's
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in THEIRS:
                    yield from (part for part in alias.name.split(".") if is_private(part))
                else:
                    elsewhere.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            if node.module.split(".")[0] not in THEIRS:
                elsewhere |= {alias.asname or alias.name for alias in node.names}
            elif any(is_private(part) for part in node.module.split(".")):
                yield from names
            else:
                yield from filter(is_private, names)
    own = defined_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            through_self = is_self(node.value) and node.attr in own
            if not through_self and root_of(node) not in elsewhere:
                yield node.attr


def modules() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", modules())
def test_no_private_name_is_missing_from_the_inventory(file):
    listed = {part for entry in PRIVATE_NAMES if file in entry.used_in for part in entry.name.split(".")}
    found = set(private_names_used(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))))
    assert found <= listed, f"put {', '.join(sorted(found - listed))} of {file} into {INVENTORY}, with the reason"


def test_private_names_are_found_in_every_form():
    used = """
import os
import torch._inductor.config
import torch.distributed as dist
from megatron.core.models import GPTModel, _hidden as seen
from torch._subclasses import FakeTensorMode
from megatron_sstoken.data import store

class Ours(GPTModel):
    def __init__(self):
        self._own = os._exit

    def _forward(self):
        self._own, self._inherited, super()._overridden()
        return store._x, dist.group._world.map, self.layers[0].get()._deep
"""
    expected = {"_inductor", "_hidden", "FakeTensorMode", "_inherited", "_overridden", "_world", "_deep"}
    assert set(private_names_used(ast.parse(used))) == expected


def test_a_name_that_moved_is_noticed():
    with pytest.raises(AttributeError, match="_old"):
        test_the_name_exists(PrivateName("megatron.core.models.gpt", "GPTModel._old", ("model/build.py",), "gone"))
    with pytest.raises(AssertionError, match="knows no old_mark"):
        test_the_name_exists(
            PrivateName("megatron.core.tensor_parallel.layers", "old_mark", ("model/build.py",), "gone", in_text=True)
        )
    with pytest.raises(ModuleNotFoundError):
        test_the_name_exists(PrivateName("megatron.core.models.old", "Old", ("model/build.py",), "gone"))
