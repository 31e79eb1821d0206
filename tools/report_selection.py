#!/usr/bin/env python3
"""Show which tokens a run selected, whether that helps, and what drifts: a page, and ranked samples with their input rows.

    python tools/report_selection.py --run runs/first --compare runs/full --output page.html
    python tools/report_selection.py --records runs/first/tokens.parquet --data runs/data/train --export dropped.jsonl

The same program as `python -m megatron_sstoken.report`.
"""

import sys
from pathlib import Path

try:
    import megatron_sstoken  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sstoken.report.program import main

if __name__ == "__main__":
    sys.exit(main(program="tools/report_selection.py"))
