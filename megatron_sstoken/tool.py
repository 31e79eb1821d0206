"""How the programs of tools/ end: one line that says what is wrong, and an exit code."""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megatron_sstoken.files import describe_os_error

DEBUG: dict[str, Any] = {"action": "store_true", "help": "where something fails, print the traceback as well"}
"""What `--debug` is, in every program."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == ()
        return action.help if says_nothing else super()._get_help_string(action)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that every program has."""
    parser.add_argument("--debug", **DEBUG)


def say_interrupted(what: str = "interrupted") -> int:
    """What a program says and returns after Ctrl-C."""
    print(what, file=sys.stderr, flush=True)
    return 130


def run_tool(body: Callable[[], int], *, debug: bool, interrupted: str = "interrupted") -> int:
    """The exit code of `body`; 2 where what the user gave cannot work, 130 for Ctrl-C."""
    try:
        return body()
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {describe_os_error(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return say_interrupted(interrupted)
