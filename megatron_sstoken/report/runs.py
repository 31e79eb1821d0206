"""What a run folder says of its run: settings, versions, times, and the curves of its figures."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from megatron_sstoken.folders import METRICS, RECORDS, RUN_FILE, STATE_FILE, WATCHED
from megatron_sstoken.report.record_files import RecordFile, find_records
from megatron_sstoken.training.metrics_file import metrics_lines

Curve: TypeAlias = list[tuple[int, float]]
"""Steps, ascending, and values."""
FAMILIES = ("loss/", "selection/", "optimizer/")
"""How the names of figures begin that a report shows."""
UNKNOWN = "unknown"


@dataclass
class Run:
    """One run, as far as its folder tells."""

    name: str
    folder: Path
    logs: Path
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """Paths and fingerprints of its data."""
    versions: dict[str, Any] = field(default_factory=dict)
    working_directory: str | None = None
    commit: str | None = None
    command: str | None = None
    start: str | None = None
    end: str | None = None
    ended: str | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """`selection.method`; where no settings are there, what the folder is called, if that is a method that selects none."""
        known = self.setting("selection", "method")
        return str(known) if known else self.name if self.name in ("full", "random") else UNKNOWN

    def setting(self, section: str, name: str) -> Any:
        values = self.settings.get(section)
        return values.get(name) if isinstance(values, dict) else None

    def path(self, text: str) -> Path:
        """A path of the settings, from where the run was started."""
        path = Path(text)
        beside = Path(self.working_directory or ".") / path
        return path if path.exists() or not beside.exists() else beside

    def records(self) -> list[RecordFile]:
        """Its token records and watched samples, ascending by step, watched ones first; [] where it wrote none."""
        found = []
        for name, watched in ((WATCHED, True), (RECORDS, False)):
            if any((self.logs / name).glob("*.parquet")):
                found += find_records(self.logs / name, watched=watched)
        return sorted(found, key=lambda one: (one.step, not one.watched))


def open_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs of folders: run folders, or their logs. ValueError for a folder that holds no run."""
    runs = [_open(Path(folder)) for folder in folders]
    for depth in (2, 3):  # those of one name are told apart by the folders above
        names = Counter(run.name for run in runs)
        for run in runs:
            if names[run.name] > 1:
                run.name = "/".join(run.folder.resolve().parts[-depth:])
    return runs


def _open(given: Path) -> Run:
    if not given.is_dir():
        raise ValueError(f"--run: {given} is not there: name the folder of a run, or its logs")
    folder, logs = _places(given)
    run = Run(name=folder.resolve().name, folder=folder, logs=logs)
    described = folder / RUN_FILE
    if described.is_file():
        _describe(run, _json(described))
        elsewhere = run.setting("logging", "directory")
        if given == folder and elsewhere:
            run.logs = run.path(str(elsewhere))
    else:
        _describe_from_checkpoint(run)
    if (run.logs / METRICS).is_file():
        run.curves = _read_metrics(run.logs / METRICS, run.notes)
    elif any(run.logs.glob("*tfevents*")):
        run.curves = _read_events(run.logs)
    has_records = any(any((run.logs / name).glob("*.parquet")) for name in (RECORDS, WATCHED))
    if not (run.curves or has_records or described.is_file()):
        raise ValueError(
            f"--run: {given} holds no log of a run (metrics.jsonl, TensorBoard events, records): name the folder of a run"
        )
    return run


def _places(given: Path) -> tuple[Path, Path]:
    """The run folder and the folder of its logs."""
    if (given / "logs").is_dir():
        return given, given / "logs"
    is_logs = given.resolve().name == "logs"
    return (given.parent if is_logs else given), given


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it; the report does without") from error
    return content if isinstance(content, dict) else {}


def _describe(run: Run, content: dict[str, Any]) -> None:
    """From run.json: what the last start says, and when the first began."""
    starts = [one for one in content.get("starts") or [] if isinstance(one, dict)]
    if not starts:
        return
    last = starts[-1]
    run.settings, run.data = _sections(last.get("settings")), dict(last.get("data") or {})
    run.versions, run.commit = dict(last.get("versions") or {}), last.get("commit")
    run.working_directory = last.get("working_directory")
    command = last.get("command")
    run.command = shlex.join(map(str, command)) if isinstance(command, list) else command
    run.start, run.end, run.ended = starts[0].get("start"), last.get("end"), last.get("ended")
    if len(starts) > 1:
        run.notes.append(f"{run.name} was started {len(starts)} times; settings and versions are of the last start")


def _describe_from_checkpoint(run: Run) -> None:
    """Runs of versions that wrote no run.json: their newest checkpoint has the settings that shape what is learnt."""
    folders = [path for path in run.folder.glob("step_*") if path.name[5:].isdigit()]
    states = sorted((path / STATE_FILE for path in folders), key=lambda path: int(path.parent.name[5:]))
    if not states or not states[-1].is_file():
        return
    state = _json(states[-1])
    objective = {name: values for name, values in (state.get("objective") or {}).items() if name != "known"}
    run.settings = _sections(objective)
    run.notes.append(
        f"{run.name} has no run.json: settings are those that its checkpoint {states[-1].parent.name} tells"
    )


def _sections(content: Any) -> dict[str, dict[str, Any]]:
    return {str(name): values for name, values in (content or {}).items() if isinstance(values, dict)}


def _read_metrics(path: Path, notes: list[str]) -> dict[str, Curve]:
    """The figures of metrics.jsonl; of a step that stands there twice, the later."""
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    for line in metrics_lines(path):
        if line is None:
            damaged += 1
            continue
        for name, value in line.items():
            if name.startswith(FAMILIES) and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[line["step"]] = float(value)
    if damaged:
        notes.append(f"{path}: {damaged} lines cannot be read and are left out")
    return {name: sorted(values.items()) for name, values in found.items()}


def _read_events(logs: Path) -> dict[str, Curve]:
    """The figures of TensorBoard's events, for runs of versions that wrote no metrics.jsonl."""
    # Imported here: few runs need it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    found: dict[str, Curve] = {}
    for name in events.Tags()["scalars"]:
        if name.startswith(FAMILIES):
            points = {event.step: event.value for event in events.Scalars(name) if math.isfinite(event.value)}
            found[name] = sorted(points.items())
    return found


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` points of a curve, evenly, the first and the last among them."""
    if len(curve) <= most:
        return curve
    return [curve[round(number * (len(curve) - 1) / (most - 1))] for number in range(most)]


def changed_settings(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those that are not the default, as section.name; settings that this version does not know count as changed."""
    # Imported here: only those who have settings need it.
    from megatron_sstoken.config import Settings

    defaults = json.loads(json.dumps(asdict(Settings()), default=str))  # as run.json has them
    return {
        f"{section}.{name}": value
        for section, values in settings.items()
        for name, value in values.items()
        if value != defaults.get(section, {}).get(name, UNKNOWN)
    }
