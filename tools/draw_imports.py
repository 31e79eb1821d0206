#!/usr/bin/env python3
"""Draw which room of megatron_sstoken imports which, as the Mermaid picture of docs/architecture.md.

A room is a folder or a single module of the package. An arrow points from the room that is imported to the one that
imports it; arrows that others imply are left out. `--write` puts the picture into the page.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
ORDER = (
    "supported words gpus garbage files folders integrity lock tool selection config given command_line device compat watchdog "
    "parallel ending data model checkpoint run_plan passes history validate training conversion planner doctor preflight "
    "report talk chat evaluate commands score train launch __main__".split()
)
"""Rooms in the order of the data's way: each imports rooms before it only."""
PICTURE = re.compile(r"```mermaid\n.*?```", re.DOTALL)


def imports_of_rooms(package: Path = ROOT / "megatron_sstoken") -> dict[str, set[str]]:
    """Room → rooms that it imports, at the top of a module or inside a function."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
                modules = [node.module or ""]
                if node.module == package.name:  # from megatron_sstoken import watchdog
                    modules = [
                        f"{package.name}.{one.name}" for one in node.names if (package / f"{one.name}.py").exists()
                    ]
            for module in modules:
                top, _, rest = module.partition(".")
                if top == package.name and rest and (other := rest.split(".")[0]) != room:
                    found.setdefault(room, set()).add(other)
    return found


def arrows_back(imports: dict[str, set[str]]) -> list[str]:
    """Imports of a room that does not stand before, and rooms without a place in `ORDER`."""
    rooms = sorted({*imports, *(other for others in imports.values() for other in others)})
    unknown = [f"{room} has no place in ORDER" for room in rooms if room not in ORDER]
    place = {room: number for number, room in enumerate(ORDER)}
    return unknown + [
        f"{room} imports {other}, which comes later"
        for room, others in sorted(imports.items())
        for other in sorted(others)
        if room in place and other in place and place[other] >= place[room]
    ]


def mermaid(imports: dict[str, set[str]]) -> str:
    """The picture; it needs imports without circles."""
    reached: dict[str, set[str]] = {}
    for room in ORDER:
        direct = imports.get(room, set())
        reached[room] = direct | {far for other in direct for far in reached[other]}
    lines = ["```mermaid", "flowchart LR"]
    for room in ORDER:
        direct = imports.get(room, set())
        implied = {far for other in direct for far in reached[other]}
        lines += [f"    {other} --> {room}" for other in ORDER if other in direct - implied]
    return "\n".join([*lines, "```"])


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 1 if a room imports a later one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the picture into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    imports = imports_of_rooms()
    if back := arrows_back(imports):
        print("\n".join(f"error: {one}" for one in back), file=sys.stderr)
        return 1
    picture = mermaid(imports)
    if options.write:
        PAGE.write_text(PICTURE.sub(picture, PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    else:
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
