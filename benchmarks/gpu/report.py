"""The Markdown report of the sections' results, made for docs/gpu_results.md."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.results import read_lines
from benchmarks.gpu.sections import TARGETS, Section

WHERE = ("device", "device_gib", "cuda", "python", "torch", "megatron_core", "transformer_engine")
_HEADERS = {
    "device_gib": "GiB",
    "cuda": "CUDA",
    "megatron_core": "megatron-core",
    "transformer_engine": "Transformer Engine",
}


def last_run(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records of a section since it was started last."""
    own = [record for record in records if record["section"] == name]
    starts = [number for number, record in enumerate(own) if record["kind"] == "start"]
    return own[starts[-1] :] if starts else []


def kinds(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one kind."""
    return [record for record in records if record["kind"] == kind]


def write_report(path: Path, results: Path, sections: tuple[Section, ...]) -> None:
    """`path` from the JSON lines of `results`: sections as listed, each as it ran last."""
    records = read_lines(results)
    runs = {section.name: last_run(records, section.name) for section in sections}
    lines = _head(runs) + _overview(sections, runs) + _targets(runs)
    for section in sections:
        if runs[section.name]:
            lines += ["", f"### {section.name}", "", section.shows[0].upper() + section.shows[1:] + "."]
            lines += _body(runs[section.name])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(runs: dict[str, list[dict]]) -> list[str]:
    starts = [run[0] for run in runs.values() if run]
    where = [record for run in runs.values() for record in kinds(run, "environment")]
    device = where[-1]["device"] if where else "no section has started"
    sizes = ", toy sizes (`--tiny`): no figure here tells of speed" if any(start["tiny"] for start in starts) else ""
    lines = [f"## {device}, {starts[-1]['time'][:10] if starts else ''}{sizes}", ""]
    commits = ", ".join(dict.fromkeys(start["commit"] for start in starts))
    distinct = dict.fromkeys(tuple(record.get(name) for name in WHERE) for record in where)
    rows = [dict(zip(map(_header, WHERE), values, strict=True)) for values in distinct]
    return [*lines, f"`benchmarks/gpu_all.py` at commit {commits}.", "", *_table(rows)]


def _overview(sections: tuple[Section, ...], runs: dict[str, list[dict]]) -> list[str]:
    rows = []
    for section in sections:
        status = kinds(runs[section.name], "status")
        rows.append(
            {
                "section": section.name,
                "outcome": status[-1]["status"] if status else "broken off" if runs[section.name] else "not run",
                "s": round(status[-1]["seconds"]) if status else None,
                "shows": section.shows,
            }
        )
    return ["", *_table(rows)]


def _targets(runs: dict[str, list[dict]]) -> list[str]:
    rows = []
    for target in TARGETS:
        run = runs.get(target.section, [])
        found = [record["measured"] for record in kinds(run, "target") if record["name"] == target.name]
        met = ("yes" if target.is_met(found[-1]) else "**no**") if found else "not measured"
        goal = f"{'≥' if target.at_least else '≤'} {_cell(target.goal)} ({target.source})"
        rows.append({"target": target.name, "goal": goal, "measured": found[-1] if found else None, "met": met})
    return ["", *_table(rows)]


def _body(run: list[dict[str, Any]]) -> list[str]:
    lines = []
    tables: dict[str, list[dict]] = {}
    for record in kinds(run, "row"):
        tables.setdefault(record["table"], []).append(record["columns"])
    for title, rows in tables.items():
        lines += ["", f"{title[0].upper()}{title[1:]}:", "", *_table(rows)]
    if checks := kinds(run, "check"):
        rows = [
            {
                "check": c["what"],
                "measured": c["measured"],
                "must be": c["limit"],
                "": "ok" if c["ok"] else "**failed**",
            }
            for c in checks
        ]
        lines += ["", *_table(rows)]
    lines += [""] * bool(kinds(run, "absent") + kinds(run, "failure"))
    lines += [f"- {record['what']}: **failed**: {record['error']}" for record in kinds(run, "failure")]
    lines += [f"- {record['what']}: not on this machine: {record['why']}" for record in kinds(run, "absent")]
    for status in kinds(run, "status"):
        if status.get("tail"):
            lines += ["", f"{status['status']}; its last lines:", "", "```text", *status["tail"], "```"]
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table; columns in the order in which they first appear."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(map(_header, names)) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]


def _header(name: str) -> str:
    return _HEADERS.get(name, name.replace("_", " "))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
