"""What a file holds: told by its content, and by its name where the content may be anything."""

import io

from megatron_sstoken.data.inputs.streams import head_of
from megatron_sstoken.data.inputs.tables import ARROW_FILE
from megatron_sstoken.data.inputs.text import BYTE_ORDER_MARK, split_json

LINES, ARRAY, OBJECTS = "JSON lines", "a JSON array", "JSON objects over several lines"
COMMAS, TABS, PARQUET, ARROW = "comma-separated values", "tab-separated values", "Parquet", "Arrow"
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
NAMES = {
    ".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".csv": COMMAS, ".tsv": TABS,
    ".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW, ".ipc": ARROW,
}  # fmt: skip
"""Ends of names (before one of `COMPRESSED`) of files that hold rows."""
_STREAM = b"\xff\xff\xff\xff"  # Arrow's stream format, as `datasets` saves it
_SUPPORTED = "JSON lines, a JSON array, Parquet, Arrow, .csv or .tsv, also compressed (gzip, zstd, bz2, lz4)"
_FOREIGN = {
    b"version https://git-lfs": ("is a pointer of Git LFS, not the data", "fetch the file (git lfs pull)"),
    b"<!doctype": ("is a web page", "download the file itself"),
    b"<html": ("is a web page", "download the file itself"),
    b"PK\x03\x04": ("is a zip archive", "unpack it"),
    b"\xfd7zXZ": ("is compressed with xz", "unpack it"),
    b"\xff\xfe": ("is UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"\xfe\xff": ("is UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
}  # fmt: skip


def named_kind(name: str) -> str | None:
    """The kind that a file's name promises."""
    lower = name.lower()
    for end in COMPRESSED:
        lower = lower.removesuffix(end)
    return next((kind for end, kind in NAMES.items() if lower.endswith(end)), None)


def kind_of(path: str) -> str:
    """What a file holds. Raises ValueError for what is none of the kinds."""
    head, codec = head_of(path)
    named = named_kind(path)
    binary = PARQUET if head.startswith(b"PAR1") else ARROW if head.startswith((ARROW_FILE, _STREAM)) else None
    if binary and codec:
        raise ValueError(f"--input: {path} is {binary} inside {codec}: unpack it (its columns are compressed as it is)")
    if binary:
        return binary
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    for magic, (problem, remedy) in _FOREIGN.items():
        if start[: len(magic)].lower() == magic.lower():
            raise ValueError(f"--input: {path} {problem}: {remedy}")
    if head[257:262] == b"ustar":
        raise ValueError(f"--input: {path} is a tar archive: unpack it")
    if named in (COMMAS, TABS):
        return named
    if start.startswith(b"["):
        return LINES if _is_line_of_its_own(start) else ARRAY
    if start.startswith(b"{"):
        return OBJECTS if _goes_on_in_the_next_line(start) else LINES
    if named == LINES and b"\0" not in start:
        return LINES
    promised = f"is not {named}, as its name says" if named else "is of no known kind"
    raise ValueError(f"--input: {path} {promised}: give {_SUPPORTED}")


def _is_line_of_its_own(start: bytes) -> bool:
    """Whether an array is the first of several lines, each a row (of the wrong form, which a message then says)."""
    first, _, rest = start.partition(b"\n")
    return rest.lstrip()[:1] in (b"[", b"{") and first.rstrip().endswith(b"]") and _is_whole(first)


def _goes_on_in_the_next_line(start: bytes) -> bool:
    """Whether an object is laid out over lines; a damaged first line is followed by another object."""
    first, more, rest = start.partition(b"\n")
    return bool(more) and rest.lstrip()[:1] != b"{" and not _is_whole(first)


def _is_whole(text: bytes) -> bool:
    """Whether brackets and strings of a text all end."""
    try:
        return bool(list(split_json(io.BytesIO(text), "", array=False)))
    except ValueError:
        return False
