#!/usr/bin/env python3
"""How far other numerics move losses and selection: scores the same data with the same weights twice, and compares.

    python benchmarks/numerics_shift.py --config FILE.yaml --other training.precision=fp8 [--other key=value …] --work FOLDER

Both runs are `megatron_sstoken.score`, each with its own history. Prints, and appends to benchmarks/results/
numerics_shift.csv: share of the selected tokens that both select, differences of loss (nat) and attention, and of the mean
loss. One process.
"""

import argparse
import copy
import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from megatron_sstoken import score  # noqa: E402
from megatron_sstoken.command_line import parse_settings  # noqa: E402
from megatron_sstoken.config import Settings  # noqa: E402
from megatron_sstoken.ending import run_to_exit_code  # noqa: E402
from megatron_sstoken.model.backend import numerics_of  # noqa: E402
from megatron_sstoken.parallel import reset_layout  # noqa: E402
from megatron_sstoken.training.records import read_records  # noqa: E402
from megatron_sstoken.validate.first import first_problems  # noqa: E402


@dataclass(frozen=True)
class Shift:
    """What differs between two records of the same tokens."""

    first: str
    other: str
    overlap: float
    """Tokens selected by both ÷ tokens selected by the first."""
    loss_mean: float
    """Mean of |difference| over the response tokens, nat."""
    loss_max: float
    mean_loss_difference: float
    """Difference of the mean losses: what does not average out."""
    attention_max: float


def compare_records(first: Path, other: Path, names: tuple[str, str] = ("first", "other")) -> Shift:
    """Compare two files of token records, whatever the order of their rows."""
    tables = []
    for path in (first, other):
        records = read_records(path)
        order = np.lexsort((records["position"], records["sample"]))
        tables.append({name: np.asarray(column)[order] for name, column in records.items()})
    a, b = tables
    assert all((a[name] == b[name]).all() for name in ("sample", "position", "token")), "records of other data"
    response = np.isfinite(a["loss"]) & (a["role"] == 1)
    losses = (b["loss"] - a["loss"])[response]
    chosen = a["selected"].astype(bool)
    return Shift(
        *names,
        overlap=float((chosen & b["selected"].astype(bool)).sum() / chosen.sum()),
        loss_mean=float(np.abs(losses).mean()),
        loss_max=float(np.abs(losses).max()),
        mean_loss_difference=float(losses.mean()),
        attention_max=float(np.abs((b["attention"] - a["attention"])[response]).max()),
    )


def changed(settings: Settings, changes: list[str]) -> Settings:
    """A copy with `section.key=value` applied."""
    other = copy.deepcopy(settings)
    for change in changes:
        name, value = change.split("=", 1)
        section, key = name.split(".")
        setattr(getattr(other, section), key, yaml.safe_load(value))
    return other


def shift_between(settings: Settings, other: Settings, work: Path) -> Shift:
    """Score with both settings and compare."""
    work.mkdir(parents=True, exist_ok=True)
    for name, one in (("first", settings), ("other", other)):
        score.run(one, str(work / f"{name}.parquet"))
        reset_layout()
    names = (numerics_of(settings), numerics_of(other))
    return compare_records(work / "first.parquet", work / "other.parquet", names)


def main() -> int:
    """Compare, print, append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="append", required=True, metavar="section.key=value")
    parser.add_argument("--work", type=Path, required=True, help="folder for the records")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "numerics_shift.csv")
    options, rest = parser.parse_known_args()
    settings, _ = parse_settings(rest, program="numerics_shift.py", description=__doc__ or "", check=first_problems)
    return run_to_exit_code(lambda: _measure(settings, options))


def _measure(settings: Settings, options: argparse.Namespace) -> None:
    row = asdict(shift_between(settings, changed(settings, options.other), options.work))
    new = not options.csv.exists()
    with open(options.csv, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{name:<21} {value}" for name, value in row.items()))


if __name__ == "__main__":
    sys.exit(main())
