"""Measure what exact selection moves between ranks, and check that it is exact, on simulated ranks.

Run `python benchmarks/selection_traffic.py`: every combination of tokens and ranks runs the very rounds that
training runs, is checked (by counting, and up to 10^7 tokens against `torch.topk`), and appends a row to
`benchmarks/results/selection_traffic.csv`; `selection_traffic.png` beside it shows the rows of this run.
"""

import argparse
import csv
import platform
import resource
import subprocess
import sys
import time
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it also runs where the package is not installed

from megatron_sstoken.selection.topk import TopK, Traffic, count_selected, simulate_topk  # noqa: E402

TOKENS = [10**exponent for exponent in range(3, 9)]
RANKS = [2, 16, 128, 1024, 4096]
NUM_VALUES = {"distinct": None, "tied": 16}
RHO = "0.6"
SCRAMBLED = 1 << 27
LOWEST_BITS = 0x30000000
"""Bits of 2^-31: from here, 2^27 consecutive bit patterns are as many different floats below 2^-15."""
SECONDS_PER_TOKEN_AND_ROUND, SECONDS_PER_RANK_AND_ROUND = 3e-8, 2.5e-4
"""What one core needs, roughly: to leave out at once what would take too long."""
BYTES_PER_TOKEN = {"distinct": 32, "tied": 56}
BYTES_PER_TOKEN_OF_A_SHARD = 40
ROUNDS = {"distinct": 3, "tied": 9}
MEMORY = 4e9
Row = dict[str, str | int | float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--max_tokens", type=int, default=max(TOKENS), help="most tokens of all ranks together")
    parser.add_argument("--max_seconds", type=float, default=20.0, help="leave out what would take longer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit()  # now: this is the code that was imported
    rows = []
    for num_tokens, kind, num_ranks in product(TOKENS, NUM_VALUES, RANKS):
        if num_tokens <= options.max_tokens and fits(num_tokens, kind, num_ranks, options.max_seconds):
            rows.append(measure(num_tokens, kind, num_ranks))
            print(rows[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    append(options.output / "selection_traffic.csv", rows)
    draw(options.output / "selection_traffic.png", rows)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def fits(num_tokens: int, kind: str, num_ranks: int, max_seconds: float) -> bool:
    """Whether a case is likely to stay within the time, and within 4 GB."""
    seconds = SECONDS_PER_TOKEN_AND_ROUND * num_tokens + SECONDS_PER_RANK_AND_ROUND * num_ranks
    memory = BYTES_PER_TOKEN[kind] * num_tokens + BYTES_PER_TOKEN_OF_A_SHARD * num_tokens / num_ranks
    return ROUNDS[kind] * seconds < max_seconds and memory < MEMORY


def measure(num_tokens: int, kind: str, num_ranks: int) -> Row:
    """Select, check, and describe one case as a row."""
    ids = torch.arange(num_tokens)
    scores = torch.empty(num_tokens)
    for part, numbers in zip(scores.split(1 << 20), ids.split(1 << 20), strict=True):
        part.copy_(make_scores(numbers, NUM_VALUES[kind]))
    shards = list(zip(scores.tensor_split(num_ranks), ids.tensor_split(num_ranks), strict=True))
    traffic = Traffic()
    start = time.process_time()
    results = simulate_topk(shards, rho=RHO, traffic=traffic)
    seconds = time.process_time() - start
    check(scores, results)
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": num_tokens,
        "ranks": num_ranks,
        "scores": kind,
        "rounds": traffic.collectives,
        "collectives": traffic.collectives,
        "reduced_bytes_per_rank": traffic.num_bytes,
        "received_bytes_per_rank": round(2 * (num_ranks - 1) / num_ranks * traffic.num_bytes),
        "gather_bytes_per_rank": 4 * num_tokens,
        "cpu_seconds_of_all_ranks": round(seconds, 4),
    }


def make_scores(ids: torch.Tensor, num_values: int | None) -> torch.Tensor:
    """fp32 like `ids` (below 2^27), in an order that looks random: all different, or one of `num_values`."""
    shuffled = ids * 0x5851F42D & (SCRAMBLED - 1)  # an odd factor: no two ids become the same
    if num_values is not None:
        return (shuffled // (SCRAMBLED // num_values)).float() / num_values
    return (shuffled + LOWEST_BITS).int().view(torch.float32)


def check(scores: torch.Tensor, results: list[TopK]) -> None:
    """The ranks' masks together are the top k of all scores, ties to the lower id (here the lower index)."""
    mask = torch.cat([result.mask for result in results])
    k = count_selected(RHO, len(scores))
    threshold = results[0].threshold
    assert mask.count_nonzero() == k, (mask.count_nonzero(), k)
    assert (scores > threshold).count_nonzero() < k <= (scores >= threshold).count_nonzero(), (threshold, k)
    if len(scores) <= 10**7:  # it takes 16 bytes a token and more
        assert threshold == scores.topk(k).values.min(), (threshold, k)
    assert all(result.threshold == threshold for result in results)
    assert bool((mask | (scores <= threshold)).all()), "a score above the threshold is not selected"
    assert bool((~mask | (scores >= threshold)).all()), "a score below the threshold is selected"
    tied = mask[scores == threshold]
    assert bool(tied[: tied.count_nonzero()].all()), "a tie went to a higher id"


@cache
def commit() -> str:
    """Short hash of HEAD at the first call; `+` if the code of the selection differs from it."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    code = "megatron_sstoken/selection"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", code], cwd=ROOT).returncode
    return head + ("+" if changed else "")


def append(path: Path, rows: list[Row]) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: list[Row]) -> None:
    """Bytes that a rank receives against tokens, beside gathering all scores."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    tokens = sorted({row["tokens"] for row in rows})
    axes.plot(tokens, [4 * count for count in tokens], "k--", label="gather all scores (fp32)")
    for kind, color in zip(NUM_VALUES, ("C0", "C1"), strict=True):
        for num_ranks, marker in zip(RANKS, "ov^sD", strict=True):
            chosen = [row for row in rows if (row["scores"], row["ranks"]) == (kind, num_ranks)]
            axes.plot(
                [row["tokens"] for row in chosen],
                [row["received_bytes_per_rank"] for row in chosen],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1,
                label=f"radix select, {kind} scores, {num_ranks:,} ranks",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of all ranks together",
        ylabel="bytes received by a rank",
        title="Exact top-ρ over all ranks: traffic of one selection",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
