#!/usr/bin/env python3
"""All that matters on one Hopper GPU, in ten minutes: right numbers, speed, memory.

    python benchmarks/gpu_all.py                       # every section, the most telling first
    python benchmarks/gpu_all.py --only tap agreement  # some; results of the others in the folder stay
    python benchmarks/gpu_all.py --tiny                # toy sizes, also on a CPU, to see that it runs

Each section is a process of its own with its own time limit. Results are written as soon as they are known: results.jsonl
(a line a result), report.md (made for docs/gpu_results.md), sections.log (what the sections printed), and what they keep.
A section that needs what the machine lacks says "not on this machine" and why. Exit code: 0 all sections that ran are well,
1 one failed, ran out of its time or gave no result, 2 a mistake in the arguments.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.report import kinds, last_run, write_report  # noqa: E402
from benchmarks.gpu.results import append_line, read_lines  # noqa: E402
from benchmarks.gpu.sections import SECTIONS, Section  # noqa: E402

LEAST_SECONDS = 20.0
"""No section is started with less time left: loading the libraries alone takes most of it."""
TINY_PATIENCE = 5
"""How many times a section's limit it may take with toy sizes: they are for machines that are slow, or busy."""
TAIL_LINES = 25
GOOD = ("ok", "not on this machine", "left out")


def run_section(section: Section, folder: Path, *, tiny: bool, seconds: float, commit: str) -> str:
    """Run one section for at most `seconds`; writes its records and returns what came of it."""
    with tempfile.TemporaryDirectory(prefix="gpu_all_", ignore_cleanup_errors=True) as work:
        return _run_in(Path(work), section, folder, tiny=tiny, seconds=seconds, commit=commit)


def _run_in(work: Path, section: Section, folder: Path, *, tiny: bool, seconds: float, commit: str) -> str:
    """`run_section` with a folder for models and data, which goes even where the section is killed."""
    results, log = folder / "results.jsonl", folder / "sections.log"
    now = _note_start(section, results, tiny=tiny, commit=commit)
    request = {
        "section": section.name, "function": section.function, "needs": section.needs, "tiny": tiny, "seconds": seconds,
        "path": str(results), "work": str(work),
    }  # fmt: skip
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.child", json.dumps(request)]
    begun = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"==== {section.name}, {now}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    status = _status(code, seconds, last_run(read_lines(results), section.name))
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        tail = [] if status in GOOD else file.read().splitlines()[-TAIL_LINES:]
    elapsed = round(time.monotonic() - begun, 1)
    append_line(
        results, {"section": section.name, "kind": "status", "status": status, "seconds": elapsed, "tail": tail}
    )
    return status


def _note_start(section: Section, results: Path, *, tiny: bool, commit: str) -> str:
    """What follows in the results is of a new run of the section; returns the time."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    append_line(results, {"section": section.name, "kind": "start", "time": now, "commit": commit, "tiny": tiny})
    return now


def _note_left_out(section: Section, results: Path, *, tiny: bool, commit: str) -> None:
    """The report names it, unless it tells of an earlier run of the section."""
    if not last_run(read_lines(results), section.name):
        _note_start(section, results, tiny=tiny, commit=commit)
        append_line(results, {"section": section.name, "kind": "status", "status": "left out, no time", "seconds": 0})


def _status(code: int | None, seconds: float, records: list[dict]) -> str:
    """What came of a section, from its exit code (None: it ran out of its time) and its records."""
    found, absent = kinds(records, "row") + kinds(records, "check"), kinds(records, "absent")
    if code is None:
        return f"timed out after {seconds:.0f} s"
    if code != 0:
        return f"failed with exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    if kinds(records, "failure"):
        return "a part failed"
    if not all(record["ok"] for record in kinds(records, "check")):
        return "a check failed"
    if not found and not absent:
        return "no result"
    return "ok" if found else "not on this machine"


def _environment() -> dict[str, str]:
    """The sections import the source tree, whether the project is installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Models that fill the GPU leave no room for fragments.
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ | {"PYTHONPATH": path}


def _end(process: subprocess.Popen) -> None:
    """End a section and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(sections: Sequence[Section], folder: Path, *, tiny: bool, minutes: float, commit: str) -> int:
    """Run the sections one after another within `minutes`; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, str] = {}
    order = (*SECTIONS, *(section for section in sections if section not in SECTIONS))
    try:
        for section in sections:
            limit = section.limit * (TINY_PATIENCE if tiny else 1)
            seconds = min(limit, deadline - time.monotonic())
            if seconds < min(LEAST_SECONDS, limit):
                outcomes[section.name] = "left out"
                _note_left_out(section, folder / "results.jsonl", tiny=tiny, commit=commit)
                print(f"{section.name:<11}left out: too little of the {minutes:g} minutes is left", flush=True)
                continue
            begun = time.monotonic()
            outcomes[section.name] = run_section(section, folder, tiny=tiny, seconds=seconds, commit=commit)
            print(f"{section.name:<11}{outcomes[section.name]} ({time.monotonic() - begun:.0f} s)", flush=True)
            write_report(folder / "report.md", folder / "results.jsonl", order)
    finally:
        write_report(folder / "report.md", folder / "results.jsonl", order)
        print(f"report: {folder / 'report.md'}", flush=True)
    return 0 if all(outcome in GOOD for outcome in outcomes.values()) else 1


def commit_of_source() -> str:
    """The commit of the source tree, or "unknown" where git or its folder is missing."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sections, in order:\n" + "\n".join(f"  {section.name:<11}{section.shows}" for section in SECTIONS),
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", default=names, help="run these")
    parser.add_argument("--skip", nargs="+", choices=names, metavar="SECTION", default=[], help="leave these out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_all", help="folder; what is there is added to")
    parser.add_argument("--minutes", type=float, help="for everything (default: 9.5; with --tiny 60)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--commit", help="what the report says where there is no git")
    options = parser.parse_args(arguments)
    wanted = [section for section in SECTIONS if section.name in set(options.only) - set(options.skip)]
    if not wanted:
        parser.error("no section is left: take some out of --skip")
    minutes = options.minutes if options.minutes is not None else 60.0 if options.tiny else 9.5
    if not minutes > 0:
        parser.error(f"--minutes={minutes} must be above 0: use 9.5")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out={options.out} cannot be made: {error.strerror}: name another folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the section under way is ended, the report written
    try:
        return run(
            wanted,
            options.out.resolve(),
            tiny=options.tiny,
            minutes=minutes,
            commit=options.commit or commit_of_source(),
        )
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
