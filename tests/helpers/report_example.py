"""A report as `report/page.py` renders it, and a hostile one.

`report_example.json` holds figures of the quickstart's run with 10 of its samples, scored by its checkpoints.
"""

import copy
import json
from pathlib import Path
from typing import Any

_EXAMPLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def example() -> dict[str, Any]:
    """The report of a quickstart run, compared with two others; a new copy each time."""
    return copy.deepcopy(_EXAMPLE)
