"""Reports as `report/page.py` renders them: of the quickstart's run, and one whose every text is hostile.

`report_example.json` holds figures of that run with 10 of its samples, as `score` writes them for its checkpoints.
"""

import copy
import json
from pathlib import Path
from typing import Any

_EXAMPLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]><svg onload=alert(2)>",
    "{{7*7}}{% raw %}${7*7}",
    "&lt;b&gt;&amp;&#0;",
    "\" onmouseover='alert(3)' x=\"",
    "a null byte \x00 here",
    "\u202eoverride",  # right to left, and not ended
    "\u2066isolate",
    "\u2028\u2029\r\n\t",
    "half a pair \ud800",
    "__proto__",
    "שלום עולם",
    "\\xe2\\x80",
    "",
    " last",
)
"""Texts that would run or reorder others if they were not taken as text."""
LONG = "unbroken" * 2500
"""20,000 characters that no line can hold."""


def example() -> dict[str, Any]:
    """The report of a quickstart run, compared with two others; a new copy each time."""
    return copy.deepcopy(_EXAMPLE)


def example_of_many(number: int) -> dict[str, Any]:
    """The same with as many samples, numbered from 0."""
    report = example()
    samples = report["samples"]
    report["samples"] = [copy.deepcopy(samples[n % len(samples)]) | {"sample": n} for n in range(number)]
    return report


def hostile() -> dict[str, Any]:
    """A report in which tokens, names, settings, sentences and notes are `HOSTILE`, and some of them `LONG`."""
    report = example()
    texts = [*HOSTILE, LONG]
    tokens = len(texts)
    values = [n / tokens for n in range(tokens)]
    columns = dict.fromkeys(("loss", "history_loss", "rel", "attention", "score", "entropy"), values)
    sample = {
        "step": 60,
        "source": HOSTILE[0],
        "dropped_share": 0.5,
        "drift": 0.1,
        "top_score": 1.0,
        "num_response": tokens,
        "first_position": 0,
        "is_cut": True,
        "tokens": {"text": texts, "id": list(range(tokens)), "role": [1] * tokens},
        "at": {"60": columns | {"selected": [n % 2 for n in range(tokens)], "weight": None}},
    }
    report["samples"] = [sample | {"sample": 0}, sample | {"sample": 1, "source": HOSTILE[3]}]
    kind = {"count": 1, "selected_share": 0.5, "loss": 1.0, "history_loss": None, "change": None}
    report["types"] = [kind | {"text": text, "id": n} for n, text in enumerate(texts)]
    report["facts"] = [{"name": text, "value": text, "meaning": text} for text in texts]
    report["groups"] = [report["groups"][0] | {"name": text} for text in HOSTILE]
    report["selection"]["scope"] = HOSTILE[0]
    for run in report["runs"]:
        run |= {name: "".join(HOSTILE) for name in ("name", "folder", "method", "commit", "command", "start", "ended")}
        run["changed"] = {f"{text}.{text}": text for text in HOSTILE}
        run["changed"]["long"] = LONG
        run["settings"] = {text: {text: text} for text in HOSTILE}
        run["versions"] = {text: text for text in HOSTILE}
        run["curves"] |= {f"loss/source/{text}": [[10, 1.0], [20, 0.5]] for text in HOSTILE}
    report["verdict"] = dict.fromkeys(report["verdict"], " ".join(texts))
    return report | {"title": "".join(HOSTILE), "notes": texts}
