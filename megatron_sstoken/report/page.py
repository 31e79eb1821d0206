"""The report as one HTML file that needs nothing else: no server, no network, no other file."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

FOLDER = Path(__file__).parent / "templates"
SCRIPTS = (
    "elements.js",
    "chart.js",
    "losses.js",
    "scores.js",
    "types.js",
    "settings.js",
    "sample.js",
    "samples.js",
    "page.js",
)
"""Parts of the one script, in order; later parts use earlier ones."""

_UNSAFE = re.compile(
    "[<>&\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, as text to be written in UTF-8.

    Whatever strings the report holds are shown as they are: they reach the page as data of a script element that no
    browser runs, and become text nodes. The page may run its own script and use its own style, and nothing else
    (Content-Security-Policy). Raises ValueError for NaN and infinity, which JSON does not know.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    style = _text_of("page.css")
    script = "\n".join(_text_of(name) for name in SCRIPTS)
    return environment.get_template("page.html").render(
        title=_printable(report["title"]),
        data=Markup(as_script_data(report)),
        style=Markup(style),
        style_hash=_hash_of(style),
        script=Markup(script),
        script_hash=_hash_of(script),
    )


def as_script_data(value: Any) -> str:
    """JSON that can stand in a script element: no character in it ends one, begins a comment, or cannot be seen.

    Half characters (surrogates), which UTF-8 cannot hold, come back from the JSON as they were.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _printable(title: str) -> str:
    """The title without what HTML cannot hold; the script sets the true one."""
    return "".join(character if character.isprintable() else "\ufffd" for character in title)


def _text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    """As a Content-Security-Policy names a script or style that stands in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
