"""Settings from YAML files and the command line."""

import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout

import jsonargparse

from megatron_sstoken.config import Settings


def parse_settings(
    arguments: list[str] | None = None, *, program: str, description: str, extra: dict[str, dict] | None = None
) -> tuple[Settings, dict]:
    """Read settings from `--config FILE.yaml` and `--section.key=value`, later ones winning.

    `extra` adds plain options of the program (name → argparse keywords). Returns the settings and the values of the
    extra options. On a mistake jsonargparse prints the reason and exits with code 2; under torchrun only rank 0 prints.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given more than once.")
    for name, keywords in (extra or {}).items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_class_arguments(Settings, as_group=False)
    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) != 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
            # torchrun ends all processes as soon as one fails: let rank 0 print its message first.
            stack.callback(lambda: time.sleep(3) if sys.exc_info()[0] is SystemExit else None)
        namespace = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    objects = parser.instantiate(namespace)
    sections = {name: objects[name] for name in Settings.__dataclass_fields__}
    return Settings(**sections), {name: objects[name] for name in (extra or {})}
