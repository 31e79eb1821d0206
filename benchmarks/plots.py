#!/usr/bin/env python3
"""Draw docs/performance_*.png from the newest rows of benchmarks/results: `python benchmarks/plots.py`."""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402


def newest(suite: str) -> list[dict[str, str]]:
    """Of every case of a suite the rows of its last run in one process."""
    with open(RESULTS / f"{suite}.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["processes"] == "1"]
    last = {row["case"]: row["time"] for row in rows}
    return [row for row in rows if row["time"] == last[row["case"]]]


def draw_head(path: Path) -> None:
    """Selective ÷ standard head: time and memory over the formula r(1 + 3ρ) ÷ 3."""
    rows = newest("head")
    figure, axes = plt.subplots(figsize=(6, 4))
    standard, selective = ([row for row in rows if row["variant"] == name] for name in ("standard", "selective"))
    pairs = list(zip(standard, selective, strict=True))
    formula = [float(selective["formula"]) for _, selective in pairs]
    middle = [float(selective["ratio"]) for _, selective in pairs]
    below = [float(s["ratio"]) - float(s["ratio_p20"]) for _, s in pairs]
    above = [float(s["ratio_p80"]) - float(s["ratio"]) for _, s in pairs]
    memory = [int(selective["peak_bytes"]) / int(standard["peak_bytes"]) for standard, selective in pairs]
    operations = [int(selective["product_flops"]) / int(standard["product_flops"]) for standard, selective in pairs]
    axes.plot([0, max(formula)], [0, max(formula)], color="grey", label="formula")
    axes.errorbar(formula, middle, [below, above], fmt="o", capsize=3, label="time (p20 to p80)")
    axes.plot(formula, operations, "x", label="operations, counted")
    axes.plot(formula, memory, "s", label="peak memory")
    for x, y, (_, row) in zip(formula, middle, pairs, strict=True):
        axes.annotate(row["case"], (x, y), xytext=(6, -10), textcoords="offset points", fontsize=7)
    axes.set(xlabel="r (1 + 3ρ) ÷ 3", ylabel="selective ÷ standard head", ylim=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_lengths(path: Path) -> None:
    """Tokens a second and peak memory over the length of a sample, against the Hugging Face loop."""
    rows = [row for row in newest("huggingface") if row["case"] != "GSM8K"]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.6))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        lengths = [int(row["tokens"]) for row in mine]
        speed.plot(lengths, [float(row["tokens_per_second"]) for row in mine], "o-", label=variant)
        memory.plot(lengths, [int(row["peak_bytes"]) / 2**20 for row in mine], "o-", label=variant)
    speed.set(xlabel="tokens of the sample", ylabel="tokens a second", xscale="log", ylim=0)
    memory.set(xlabel="tokens of the sample", ylabel="peak memory of a step, MiB", xscale="log", yscale="log")
    for axes in (speed, memory):
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, map(str, lengths))
    speed.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    for suite, draw, name in (("head", draw_head, "head"), ("huggingface", draw_lengths, "lengths")):
        if (RESULTS / f"{suite}.csv").is_file():
            draw(DOCS / f"performance_{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
