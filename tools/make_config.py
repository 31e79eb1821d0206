#!/usr/bin/env python3
"""The program `python -m megatron_sstoken make_config`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sstoken.commands.make_config import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
