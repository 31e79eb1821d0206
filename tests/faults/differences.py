"""How soon two processes that disagree are told: `python -m tests.faults.differences` lets them differ in one thing at a time.

They stand for two nodes: each has its own settings, or its own files at the same paths. Exit code 1 where the two do not both
end with exit code 2 and both sides in the message.
"""

import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.helpers import cli, programs
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

OTHER_SETTINGS = {
    "selection.method": {"selection__method": "full"},
    "selection.rho": {"selection__rho": 0.25},
    "optimizer.learning_rate": {"optimizer__learning_rate": 7e-5},
    "training.seed": {"training__seed": 3},
    "training.steps": {"training__steps": 5},
    "training.global_batch_size": {"training__global_batch_size": 4},
    "checkpoint.save_every": {"checkpoint__save_every": 1},
    "data.sequence_length": {"data__sequence_length": 64},
    "checkpoint.resume": {"checkpoint__resume": 2},
}
OTHER_FILES = ("data", "model", "run")


def make_places(folder: Path, other: str | None) -> list[Path]:
    """A working directory for each process; `other`: what is not the same in the second."""
    places = [folder / "node0", folder / "node1"]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        seed = int(number == 1 and other == "data")
        make_store(place / "data", make_samples(8, seed=seed))
        make_model(place / "model", seed=int(number == 1 and other == "model"))
    if other != "run":
        (folder / "run").mkdir()
        for place in places:
            (place / "run").symlink_to(folder / "run")
    return places


def _start_in(places: list[Path], arguments: list[list[str]]) -> list[tuple[int, str, float]]:
    """Exit code, output and seconds of each process."""
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    program = programs.start("megatron_sstoken.train", arguments, 2, folder, before=partial(_go_to_place, places))
    ended = program.wait()
    shutil.rmtree(folder)
    return [(code, output, time.monotonic() - begun) for code, output in ended]


def _go_to_place(places: list[Path], rank: int) -> None:
    os.environ["LOCAL_RANK"] = "0"  # each is the first of its node
    os.chdir(places[rank])


def main() -> int:
    """Entry point; returns the exit code."""
    failed, rows = 0, []
    for name in (*OTHER_SETTINGS, *OTHER_FILES):
        with tempfile.TemporaryDirectory() as folder:
            places = make_places(Path(folder), name if name in OTHER_FILES else None)
            arguments = []
            for number in range(2):
                changes = OTHER_SETTINGS.get(name, {}) if number else {}
                values = {"training__steps": 2, "training__global_batch_size": 2, "checkpoint__directory": "run"}
                arguments.append(cli.settings_arguments(make_settings("model", "data", **(values | changes))))
            ended = _start_in(places, arguments)
        told = [[line for line in output.splitlines() if line.startswith("error: ")] for _, output, _ in ended]
        good = [code for code, *_ in ended] == [2, 2] and told[0] == told[1] and "process 1" in " ".join(told[0])
        failed += not good
        rows.append(f"| {name} | {'told' if good else 'NOT TOLD'} | {max(seconds for *_, seconds in ended):.1f} |")
        print(rows[-1], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
