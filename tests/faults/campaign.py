"""Kill runs at random moments, start them again, and compare them with runs that nobody disturbed.

    python -m tests.faults.campaign --kills 100 [--seed 1] [--layouts tp2,dp2,pp2,single] [--only save] [--slow_writes 0.02]
        [--asynchronous false]

Every run gets up to three kills of one kind and is started again by the same command until it ends by itself. Exit code 0:
every run ended equal bit for bit to the undisturbed one, no sample was lost or repeated, and no process and no file was
left; else 1. Ctrl-C (or SIGTERM) ends it with the table so far. Folders of runs that went wrong stay.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "SSTOKEN_DEVICE": "cpu"}  # before torch
os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # semaphores of killed processes

from tqdm import tqdm  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from tests.faults.compare import Difference, compare  # noqa: E402
from tests.faults.harness import POLL, Start  # noqa: E402
from tests.helpers.cli import settings_arguments  # noqa: E402
from tests.helpers.workbench import LAYOUTS, make_model, make_samples, make_settings, make_store  # noqa: E402

NUM_SAMPLES, NUM_STEPS, KEEP = 66, 17, 2  # the border between two epochs lies inside a batch
SAVE_EVERY = {"tp2": 3, "dp2": 3, "pp2": 2, "single": 2}
KINDS = {
    "whole": "all processes, at any moment",
    "rank": "one of two processes, at any moment after they have met",
    "save": "all, while a checkpoint is being written",
    "rename": "all, just after a checkpoint has appeared",
    "history": "all, while history losses are scored",
}
PATIENCE = 60.0
"""Seconds in which a process must end when another one has been killed."""
LONGEST = 180.0
"""Seconds in which an undisturbed start must end."""


@dataclass
class Tally:
    """What became of the runs that were killed in one way; kills are counted, and what was lost or left."""

    tries: int = 0
    survived: int = 0
    samples: int = 0
    processes: int = 0
    folders: int = 0
    hangs: int = 0
    slowest: float = 0.0
    """Seconds that the slowest process took to end after another one had been killed."""

    def is_clean(self) -> bool:
        """Whether nothing was lost, left or hung."""
        return self.survived == self.tries and not (self.samples or self.processes or self.folders or self.hangs)


@dataclass
class Campaign:
    """A folder with a model, and in it a folder for every run."""

    folder: Path
    rnd: random.Random
    tallies: dict[str, Tally]
    slow_writes: float = 0.0
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""
    spans: dict[tuple[str, str], float] = field(default_factory=dict)
    """Kind and layout → seconds in which a kill may come, once its moment has begun."""
    number: int = 0

    def prepare(self, layouts: list[str]) -> None:
        """Make model and data, and the undisturbed run of each layout."""
        make_model(self.folder / "model")
        make_store(self.folder / "data", make_samples(NUM_SAMPLES, seed=7))
        for layout in tqdm(layouts, "undisturbed runs", unit="run"):
            run = self.new_run(f"undisturbed-{layout}")
            seen: dict[str, float] = {}
            with self.start(run, layout) as start:
                for now, new in follow(start, run):
                    seen |= dict.fromkeys(new - seen.keys(), now)
                took = time.monotonic() - start.begun
                if not start.end(0) or not start.succeeded():
                    raise SystemExit(f"error: the undisturbed run of {layout} failed:\n{start.output(0)}")
            times = {kind: sorted(t for name, t in seen.items() if begins(kind, name)) for kind in KINDS}
            # The first checkpoint takes longer: it starts megatron's helper.
            save = statistics.median(b - a for a, b in zip(times["save"], times["rename"], strict=True))
            history = times["history"][-1] - times["history"][0]
            for kind, span in {"whole": took, "rank": took, "save": save, "rename": 0.02, "history": history}.items():
                self.spans[kind, layout] = span

    def new_run(self, name: str) -> Path:
        """A folder for a run, with its own copy of the data, beside which the run keeps its history."""
        shutil.copytree(self.folder / "data", self.folder / name / "data")
        return self.folder / name

    def start(self, run: Path, layout: str) -> Start:
        """The same command every time."""
        num_ranks, parallel = LAYOUTS[layout]
        changes = {
            "training__global_batch_size": 4,
            "training__micro_batch_size": 2,
            "training__steps": NUM_STEPS,
            "optimizer__schedule": "linear",
            "checkpoint__directory": str(run / "run"),
            "checkpoint__save_every": SAVE_EVERY[layout],
            "checkpoint__keep": KEEP,
            "checkpoint__asynchronous": self.asynchronous,
            "logging__records_every": 1,
        }
        settings = make_settings(str(self.folder / "model"), str(run / "data"), **changes, **parallel)
        return Start(settings_arguments(settings), num_ranks, run / "output", self.slow_writes)

    def killed_run(self, kind: str, layout: str, wanted: int) -> None:
        """A run with `wanted` kills, or as many as come about; then compared. Deletes its folder if all is well."""
        self.number += 1
        run, tally, kills, problems = self.new_run(f"{self.number:03d}-{kind}-{layout}"), self.tallies[kind], 0, []
        killed = True
        while killed:
            with self.start(run, layout) as start:
                killed = kills < wanted and self.kill_at_random(start, run, kind, layout)
                when, patience = time.monotonic(), PATIENCE if killed else LONGEST
                if not start.end(patience):
                    tally.hangs += 1
                    problems.append(f"a process did not end by itself within {patience:.0f} s")
                if killed and kind == "rank":
                    tally.slowest = max(tally.slowest, time.monotonic() - when)
                left = start.left_processes()
            tally.processes += len(left)
            problems += [f"left: {process}" for process in left]
            kills += killed
        if kills:
            self.judge(start, run, layout, kills, tally, problems)
        if problems:
            tqdm.write("\n  ".join([f"{run}:", *problems]), file=sys.stderr)
        else:
            shutil.rmtree(run)

    def judge(self, last: Start, run: Path, layout: str, kills: int, tally: Tally, problems: list[str]) -> None:
        """Compare a run that has ended with the undisturbed one."""
        if last.succeeded():
            difference = compare(self.folder / f"undisturbed-{layout}", run)
        else:
            difference = Difference([f"the last start failed:\n{last.output(0)[-1500:]}"])
        tally.tries += kills
        tally.survived += 0 if difference.problems else kills
        tally.samples += difference.samples
        tally.folders += len(difference.left)
        problems += [*difference.problems, *(f"left: {name}" for name in difference.left)]

    def kill_at_random(self, start: Start, run: Path, kind: str, layout: str) -> bool:
        """Wait for a moment of the kind and kill; False where the run ended before."""
        delay, when = self.rnd.uniform(0, self.spans[kind, layout]), None
        event = self.rnd.randint(1, 3) if kind in ("save", "rename") else 1  # of several, which
        for now, new in follow(start, run):
            if when is None:
                event -= sum(begins(kind, name) for name in new)
                when = now + delay if event <= 0 else None
            if when is not None and now >= when:
                victims = start.alive()
                self.rnd.shuffle(victims)
                start.kill(victims[:1] if kind == "rank" else victims)
                return True
        return False


def follow(start: Start, run: Path) -> Iterator[tuple[float, set[str]]]:
    """Seconds since the start, and what has appeared since the last look, until the run ends or takes too long."""
    known = _visible(run)
    yield 0.0, {"started"}
    while start.alive() and (now := time.monotonic() - start.begun) < LONGEST:
        visible = _visible(run) | ({"met"} if "met" in known or "checkpoints  " in start.output(0) else set())
        yield now, visible - known
        known |= visible
        time.sleep(POLL)


def _visible(run: Path) -> set[str]:
    """What can be seen of a run from outside: names in its checkpoint directory, and how far its history is."""
    found: set[str] = set()
    with suppress(FileNotFoundError):
        found.update(os.listdir(run / "run"))
    return found | {f"history {written.stat().st_size}" for written in (run / "data").glob("history/*/written.bin")}


def begins(kind: str, name: str) -> bool:
    """Whether something that has just appeared tells that the moment of a kind has begun."""
    if kind in ("whole", "rank"):
        return name == {"whole": "started", "rank": "met"}[kind]
    if kind == "history":
        return name.startswith("history ")
    return name.startswith("step_") and name.endswith(".partial") == (kind == "save")


def table(tallies: dict[str, Tally]) -> str:
    """Markdown."""
    names = ("tries", "survived", "samples", "processes", "folders", "hangs")
    head = (
        "kind",
        "tries",
        "survived",
        "lost or repeated samples",
        "processes left",
        "files and folders left",
        "hangs",
    )
    rows = [head, ("---", *["---:"] * len(names))]
    rows += [(f"{kind}: {KINDS[kind]}", *(str(getattr(t, name)) for name in names)) for kind, t in tallies.items()]
    rows.append(("all", *(str(sum(getattr(tally, name) for tally in tallies.values())) for name in names)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--layouts", default=",".join(SAVE_EVERY), help=f"default: {','.join(SAVE_EVERY)}")
    help_slow = "seconds that a tensor takes to be written, as if it were large or the disk slow (default: 0)"
    parser.add_argument("--slow_writes", type=float, default=0.0, help=help_slow)
    parser.add_argument("--asynchronous", choices=("true", "false"), default="true", help="checkpoint.asynchronous")
    parser.add_argument("--only", choices=KINDS, help="one kind of kill")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    layouts, kinds = options.layouts.split(","), [options.only] if options.only else list(KINDS)
    if unknown := set(layouts) - set(SAVE_EVERY):
        raise SystemExit(f"error: --layouts={','.join(sorted(unknown))}: use some of {','.join(SAVE_EVERY)}")
    disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process of a run is left behind
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    campaign = Campaign(
        folder,
        random.Random(options.seed),
        {kind: Tally() for kind in kinds},
        options.slow_writes,
        options.asynchronous == "true",
    )
    tallies = campaign.tallies
    try:
        campaign.prepare(layouts)
        with tqdm(total=options.kills, desc="kills", unit="kill") as bar:
            while bar.n < options.kills:
                kind = min(kinds, key=lambda kind: tallies[kind].tries)
                layout = campaign.rnd.choice([one for one in layouts if kind != "rank" or LAYOUTS[one][0] > 1])
                campaign.killed_run(kind, layout, min(campaign.rnd.choice((1, 1, 2, 3)), options.kills - bar.n))
                bar.update(sum(tally.tries for tally in tallies.values()) - bar.n)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print(table(tallies))
    clean = all(tally.is_clean() for tally in tallies.values())
    if slowest := max(tally.slowest for tally in tallies.values()):
        print(f"\nWhere one process was killed, the other ended after {slowest:.1f} s at most.")
    if clean:
        shutil.rmtree(folder)
    else:
        print(f"\nWhat went wrong is in {folder}.")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
