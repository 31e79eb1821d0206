#!/usr/bin/env python3
"""Write the config.json of a published model, without download: for plans and dry runs on its real architecture."""

import argparse
import sys
from pathlib import Path

try:
    import megatron_sstoken  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sstoken.model.published import PUBLISHED, write_config


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=PUBLISHED, help="name of the model")
    parser.add_argument("--output", required=True, help="folder to write config.json to")
    options = parser.parse_args(arguments)
    try:
        print(f"written: {write_config(options.model, options.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
