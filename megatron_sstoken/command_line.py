"""Settings from YAML files and the command line."""

import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

import jsonargparse
import yaml

from megatron_sstoken.config import RENAMED, Settings
from megatron_sstoken.tool import DEBUG

PARSER_MODE = "settings"
"""jsonargparse's name for our reader of YAML."""


class _Parser(jsonargparse.ArgumentParser):
    def print_usage(self, file: Any = None) -> None:
        """Nothing: the names of all settings would bury the line that says what is wrong; --help lists them."""


def parse_settings(
    arguments: list[str] | None = None, *, program: str, description: str, extra: dict[str, dict] | None = None
) -> tuple[Settings, dict]:
    """Read settings from `--config FILE.yaml` and `--section.key=value`, later ones winning.

    `extra` adds plain options of the program (name → argparse keywords). Returns the settings and the values of the
    extra options. On a mistake jsonargparse prints the reason and exits with code 2; under torchrun only the first
    process of each node prints.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader(PARSER_MODE, _load_yaml, (yaml.YAMLError,))
    parser = _Parser(prog=program, description=description, exit_on_error=True, parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given more than once.")
    extra = (extra or {}) | {"debug": DEBUG}
    for name, keywords in extra.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_class_arguments(Settings, as_group=False)
    with ExitStack() as stack:
        if not is_first_of_node():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
            # torchrun ends all processes as soon as one fails: let the first print its message.
            stack.callback(lambda: time.sleep(3) if sys.exc_info()[0] is SystemExit else None)
        given = sys.argv[1:] if arguments is None else arguments
        namespace = parser.parse_args([_with_new_name(argument) for argument in given])
    objects = parser.instantiate(namespace)
    sections = {name: objects[name] for name in Settings.__dataclass_fields__}
    return Settings(**sections), {name: objects[name] for name in extra}


def is_first_of_node() -> bool:
    """Whether this process speaks for those of its node, each of which has its own output."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0


def _with_new_name(argument: str) -> str:
    """An argument that names a setting as one version ago, with its name of today."""
    for (section, old), new in RENAMED.items():
        name, equals, value = argument.partition("=")
        if name == f"--{section}.{old}":
            _tell_renamed(section, old, new)
            return f"--{section}.{new}{equals}{value}"
    return argument


def _load_yaml(text: str) -> Any:
    """What YAML holds, settings under their names of today. A file with both names keeps them: the old one is refused."""
    loaded = jsonargparse.get_loader("yaml")(text)
    for (section, old), new in RENAMED.items():
        values = loaded.get(section) if isinstance(loaded, dict) else None
        if isinstance(values, dict) and old in values and new not in values:
            loaded[section] = {new if name == old else name: value for name, value in values.items()}
            _tell_renamed(section, old, new)
    return loaded


def _tell_renamed(section: str, old: str, new: str) -> None:
    """Under torchrun heard of the first process of a node: the others' stderr is silent while they parse."""
    print(
        f"note: {section}.{old} is now {section}.{new}: the old name will be removed in the next version",
        file=sys.stderr,
    )
