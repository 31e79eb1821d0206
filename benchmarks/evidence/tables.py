"""Tables in Markdown and plots, made from the figures alone.

python -m benchmarks.evidence.tables FIGURES.csv FOLDER
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Plot

from benchmarks.evidence.arms import ARMS, TIMES
from benchmarks.evidence.figures import RIGHT, Figures
from benchmarks.evidence.recovery import RHO, SCORES
from benchmarks.intervals import Interval

MEASURES = ("clean all", "clean digits", "clean operators", "clean words", "prose all", RIGHT)
"""Losses at the end in nats, and the share of answers that are right where it was measured."""


def write_tables(figures: Figures, folder: Path) -> None:
    """`evidence_tables.md` and `evidence_*.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for noise, rate in figures.settings():
        title = f"{100 * noise:g} % of the answers faulty, {rate} learning rate"
        parts += [f"### {title}", _losses(figures, noise, rate), _differences(figures, noise, rate)]
        parts.append(_recovery(figures, noise, rate))
    (folder / "evidence_tables.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    for noise, rate in figures.settings():
        _plot_differences(figures, noise, rate, folder / f"evidence_{100 * noise:g}_{rate}.png")
    _plot_recovery(figures, folder / "evidence_recovery.png")


def _arms(figures: Figures, noise: float, rate: str) -> list[str]:
    return [arm for arm in ARMS if figures.by_seed(noise, rate, arm, "clean all")]


def _measures(figures: Figures, noise: float, rate: str) -> list[str]:
    """Those of `MEASURES` that there are figures of."""
    arms = _arms(figures, noise, rate)
    return [name for name in MEASURES if any(figures.by_seed(noise, rate, arm, name) for arm in arms)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _losses(figures: Figures, noise: float, rate: str) -> str:
    """Measures at the end, what is dropped, and what it took."""
    arms, measures = _arms(figures, noise, rate), _measures(figures, noise, rate)
    start = [str(figures.mean(noise, rate, arms[0], f"{name} at the start")).partition(" ")[0] for name in measures]
    rows: list[list[object]] = [["before training", *start, "", "", ""]]
    for arm in arms:
        numbers = [figures.mean(noise, rate, arm, name) for name in (*measures, "dropped - history at the end")]
        seconds, tokens = (figures.mean(noise, rate, arm, name).mean for name in ("seconds", "tokens"))
        rows.append([f"`{arm}`", *numbers, f"{seconds:.0f}", f"{tokens:,.0f}"])
    return _table(["arm", *measures, "dropped − history", "seconds", "tokens"], rows)


def _differences(figures: Figures, noise: float, rate: str) -> str:
    """Paired differences of the measures to the arms that an arm is compared with."""
    measures = _measures(figures, noise, rate)
    rows: list[list[object]] = []
    for arm in _arms(figures, noise, rate):
        for other in ARMS[arm].compared_with:
            if other != arm and figures.by_seed(noise, rate, other, "clean all"):
                numbers = [figures.difference(noise, rate, arm, other, name) for name in measures]
                rows.append([f"`{arm}` − `{other}`", *map(_marked, numbers)])
    return _table(["difference", *measures], rows) if rows else ""


def _marked(one: Interval) -> str:
    """In bold where the interval excludes 0."""
    sure = not math.isnan(one.half) and abs(one.mean) > one.half
    return f"**{one}**" if sure else str(one)


def _recovery(figures: Figures, noise: float, rate: str) -> str:
    """Of `full` and `sstoken`: AUC over time, and what each score drops at the end."""
    tables = []
    for arm in ("full", "sstoken"):
        if not figures.by_seed(noise, rate, arm, "AUC random, end"):
            continue
        rows = [
            [
                f"`{score}`",
                *(figures.mean(noise, rate, arm, f"AUC {score}, {time}") for time in TIMES),
                figures.mean(noise, rate, arm, f"noise dropped by {score}, end"),
                figures.mean(noise, rate, arm, f"clean dropped by {score}, end"),
                figures.mean(noise, rate, arm, f"loss of selected by {score}, end"),
            ]
            for score in SCORES
        ]
        head = [
            "score",
            *(f"AUC, {time}" for time in TIMES),
            f"noise dropped at ρ {RHO}",
            "clean dropped",
            "loss of selected",
        ]
        tables.append(f"Noise recovered while `{arm}` trains:\n\n" + _table(head, rows))
    return "\n\n".join(tables)


def _plot_differences(figures: Figures, noise: float, rate: str, path: Path) -> None:
    """Differences to `full` (or its like of two epochs), with intervals."""
    arms = [arm for arm in _arms(figures, noise, rate) if ARMS[arm].compared_with]
    if not arms:
        return
    plot = Plot(figsize=(8, 0.35 * len(arms) + 1.5), layout="constrained")
    axes = plot.subplots(1, 2, sharey=True)
    for axis, measure, title in zip(axes, ("clean all", "prose all"), ("GSM8K, clean", "prose"), strict=True):
        found = [figures.difference(noise, rate, arm, ARMS[arm].compared_with[0], measure) for arm in arms]
        means, halves = [one.mean for one in found], [0 if math.isnan(one.half) else one.half for one in found]
        axis.errorbar(means, range(len(arms)), xerr=halves, fmt="o", capsize=3)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_xscale("symlog", linthresh=0.1)  # what differs by 0.03 is seen beside what differs by 3
        axis.set_xticks([-1, -0.1, 0, 0.1, 1], ["−1", "−0.1", "0", "0.1", "1"])
        ends = [mean + sign * half for mean, half in zip(means, halves, strict=True) for sign in (-1, 1)]
        axis.set_xlim(1.2 * min(-0.03, *ends), 1.2 * max(0.03, *ends))
        axis.set_yticks(range(len(arms)), arms)
        axis.set_xlabel(f"loss − loss of full (nats), {title}")
        axis.invert_yaxis() if axis is axes[0] else None
    plot.suptitle(f"{100 * noise:g} % of the answers faulty, {rate} learning rate; 95 % intervals")
    plot.savefig(path, dpi=110)


def _plot_recovery(figures: Figures, path: Path) -> None:
    """AUC of each score at the start, in the middle and at the end of `full`."""
    settings = [one for one in figures.settings() if figures.by_seed(*one, "full", "AUC random, end")]
    if not settings:
        return
    noise, rate = max(settings)
    plot = Plot(figsize=(7, 4), layout="constrained")
    axis = plot.subplots()
    for score in SCORES:
        found = [figures.mean(noise, rate, "full", f"AUC {score}, {time}") for time in TIMES]
        halves = [0 if math.isnan(one.half) else one.half for one in found]
        axis.errorbar(range(len(TIMES)), [one.mean for one in found], yerr=halves, marker="o", capsize=3, label=score)
    axis.axhline(0.5, color="0.6", linewidth=1)
    axis.set_xticks(range(len(TIMES)), TIMES)
    axis.set_ylabel("chance that a clean token scores above noise")
    plot.legend(loc="outside right center", fontsize="small")
    plot.savefig(path, dpi=110)


if __name__ == "__main__":
    write_tables(Figures.from_csv(Path(sys.argv[1])), Path(sys.argv[2]))
