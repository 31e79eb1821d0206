"""Settings from YAML files and the command line, read before anything heavy is imported."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonargparse

from megatron_sstoken.config import Settings
from megatron_sstoken.folders import local_model
from megatron_sstoken.given import OF_PARSER, AllGiven, Given, problem_of_value
from megatron_sstoken.tool import DEBUG

PRINT_SCHEMA = "print_schema"


class _Parser(jsonargparse.ArgumentParser):
    def print_usage(self, file: Any = None) -> None:
        """Nothing: the names of all settings would bury the line that says what is wrong; --help lists them."""


def parse_settings(
    arguments: list[str] | None = None,
    *,
    program: str,
    description: str,
    extra: dict[str, dict] | None = None,
    check: Callable[[Settings], list[str]] | None = None,
) -> tuple[Settings, dict]:
    """Read settings from `--config FILE.yaml` and `--section.key=value`, later ones winning.

    `extra` adds plain options of the program (name → argparse keywords). `check` tells which rules the settings break, as far
    as that takes no time. Returns the settings and the values of the extra options. All mistakes are printed, then the program
    ends with exit code 2; under torchrun only the first process of each node prints.
    """
    extra = (extra or {}) | {"debug": DEBUG}
    parser = _parser(program, description, extra)
    found = AllGiven(extra).read(sys.argv[1:] if arguments is None else arguments)
    for note in found.notes if is_first_of_node() else ():
        print(note, file=sys.stderr)
    namespace, problems = _parse(parser, found)
    objects = parser.instantiate(namespace)
    settings = Settings(**{name: objects[name] for name in Settings.__dataclass_fields__})
    for name, keywords in extra.items():
        if keywords.get("required") and objects[name] is None:
            problems.append(f"--{name} is not given: {keywords['help']}")
    settings.model.hf_path = _local(settings.model.hf_path)
    settings.history.hf_path = _local(settings.history.hf_path)
    settings.history.reference_hf_path = _local(settings.history.reference_hf_path)
    if check is not None and found.is_whole:
        problems += check(settings)
    if problems:
        _refuse(problems)
    return settings, {name: objects[name] for name in extra}


def _local(path: str | None) -> str | None:
    return None if path is None else local_model(path)


def _parser(program: str, description: str, extra: dict[str, dict]) -> _Parser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given more than once.")
    parser.add_argument(
        f"--{PRINT_SCHEMA}", action=_PrintSchema, help="Print the JSON schema of such files, for editors."
    )
    for name, keywords in extra.items():  # what is required and missing is told with all else
        parser.add_argument(f"--{name}", **{key: value for key, value in keywords.items() if key != "required"})
    parser.add_class_arguments(Settings, as_group=False)
    return parser


class _PrintSchema(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **keywords: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=keywords.get("help"))

    def __call__(self, *_: Any) -> None:
        from megatron_sstoken.config.schema import schema_text

        print(schema_text())
        sys.exit(0)


def _parse(parser: _Parser, found: AllGiven) -> tuple[Any, list[str]]:
    """The namespace of all that can be taken, and what cannot."""

    def words(given: list[Given]) -> list[str]:
        return [word for one in given for word in one.arguments]

    def refusal(one: Given) -> str | None:
        try:
            parser.parse_args([*one.arguments])
        except argparse.ArgumentError as error:
            return " ".join(str(error).split())
        return None

    # --print_config and its like end the program, as if all were well: they wait until it is.
    given = [one for one in found.given if not _prints(one)]
    try:
        namespace = parser.parse_args(words(given))
    except argparse.ArgumentError:  # it names the first mistake alone
        refused = {one: problem_of_value(one, refusal(one)) for one in given}
        taken = [one for one in given if refused[one] is None]
        return parser.parse_args(words(taken)), found.problems + [one for one in refused.values() if one is not None]
    return namespace if found.problems else parser.parse_args(words(found.given)), found.problems


def _prints(one: Given) -> bool:
    return bool(one.arguments) and one.arguments[0].removeprefix("--").partition("=")[0] in OF_PARSER


def _refuse(problems: list[str]) -> None:
    """Print the problems and end with exit code 2."""
    if is_first_of_node():
        for problem in dict.fromkeys(problems):
            print(f"error: {problem}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all processes as soon as one fails: let the first print its message
    sys.exit(2)


def is_first_of_node() -> bool:
    """Whether this process speaks for those of its node, each of which has its own output."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
