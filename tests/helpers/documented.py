"""The input rows that the documentation shows: they must work as they stand."""

import json
import re
from typing import Any

from tests.helpers.cli import ROOT


def rows_of(page: str) -> dict[str, dict[str, Any]]:
    """Rows of the tables of a page of the repository, by what the table calls them."""
    text = (ROOT / page).read_text("utf-8")
    found = re.findall(r"^\|([^|]*)\| `(\{.*\})` \|", text, re.MULTILINE)
    return {f"{number}: {name.strip()}": json.loads(row) for number, (name, row) in enumerate(found)}
