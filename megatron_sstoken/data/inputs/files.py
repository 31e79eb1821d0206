"""What `--input` names: files, folders of them, patterns and saved data sets → the files to read, each with its label."""

import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sstoken.data.inputs.cells import read_cells
from megatron_sstoken.data.inputs.chunks import Chunk
from megatron_sstoken.data.inputs.kinds import (
    ARRAY,
    ARROW,
    COMMAS,
    COMPRESSED,
    LINES,
    NAMES,
    PARQUET,
    TABS,
    kind_of,
    named_kind,
)
from megatron_sstoken.data.inputs.streams import InputBytes, changed, state_of
from megatron_sstoken.data.inputs.tables import read_arrow, read_parquet
from megatron_sstoken.data.inputs.text import read_array, read_lines, read_objects
from megatron_sstoken.data.output import store_folders

NUM_TOLD = 5  # names of files in a note
_LABELLED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_NO_ROWS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"))


@dataclass
class InputFile:
    """One file with rows; `position`, of `size` bytes, says how far it has been read."""

    path: str
    stem: str
    """What samples are labelled with where neither `label` nor the row says anything."""
    label: str | None = None
    """What the user called it."""
    kind: str = field(init=False)
    size: int = field(init=False)
    position: int = 0

    def __post_init__(self) -> None:
        self.kind = kind_of(self.path)
        self.size = os.path.getsize(self.path)
        self._bytes = InputBytes(self.path)

    def chunks(self) -> Iterator[Chunk]:
        """All rows. Raises ValueError for a damaged file, or one that changes meanwhile."""
        if self.kind in (PARQUET, ARROW):
            yield from self._table_chunks()
            return
        with self._bytes.unpacked() as stream:
            for chunk in self._text_chunks(stream):
                self.position = self._bytes.size
                yield chunk
            while stream.read(1 << 20):  # to the end of the file, for its hash
                pass
        self.position = self.size = self._bytes.size

    def _text_chunks(self, stream: Any) -> Iterator[Chunk]:
        if self.kind in (COMMAS, TABS):
            return read_cells(stream, self.path, "," if self.kind == COMMAS else "\t")
        return {LINES: read_lines, ARRAY: read_array}.get(self.kind, read_objects)(stream, self.path)

    def _table_chunks(self) -> Iterator[Chunk]:
        before = state_of(self.path)
        self._bytes.read_through()
        for share, chunk in (read_parquet if self.kind == PARQUET else read_arrow)(self.path):
            self.position = int(share * self.size)
            yield chunk
        if state_of(self.path) != before:
            raise changed(self.path)
        self.position = self.size

    def describe(self) -> dict[str, Any]:
        """Path, size and sha256 of the bytes on disk, for the manifest, once all has been read."""
        return {"path": self.path, "size": self._bytes.size, "sha256": self._bytes.sha256}


def find_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """The files behind paths, patterns (`*`) and `name=PATH`, in order, those of a folder by name.

    Raises ValueError for what is not there, cannot be read or is of no known kind, and for a folder that holds several splits.
    """
    if not inputs:
        raise ValueError("--input: no file given: give at least one")
    found: list[InputFile] = []
    for text in inputs:
        label, path = split_label(str(text))
        for file, stem in _expand(path):
            if not os.access(file, os.R_OK):
                raise ValueError(f"--input: {file} cannot be read: let this user read it")
            found.append(InputFile(str(file), stem, label))
            if not found[-1].size:
                _note(f"{file} is empty")
    seen: set[str] = set()
    for one in found:
        real = os.path.realpath(one.path)
        if real in seen:
            _note(f"{one.path} is read more than once")
        seen.add(real)
    return found


def split_label(text: str) -> tuple[str | None, str]:
    """`name=PATH` → name and path; a path that exists as it is has no name."""
    match = None if os.path.lexists(text) else _LABELLED.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)


def _expand(path: str) -> Iterator[tuple[Path, str]]:
    """(file, stem) of what a path names."""
    place = Path(path)
    if place.is_dir():
        yield from ((file, place.resolve().name) for file in _in_folder(place))
    elif place.is_file():
        yield place, _stem(place)
    elif place.exists():
        raise ValueError(f"--input: {path} is a pipe or device, and must be a file: save what it gives in one")
    elif glob.has_magic(path):
        if not (matches := sorted(glob.glob(path, recursive=True))):
            raise ValueError(f"--input: {path} matches no file: correct the pattern")
        for match in map(Path, matches):
            if match.is_dir():
                yield from ((file, match.name) for file in _in_folder(match))
            else:
                yield from _expand(str(match))
    else:
        raise ValueError(f"--input: {path} is not there: give files, folders or patterns in quotes")


def _stem(path: Path) -> str:
    """The name without what tells the kind, and without the number of a part: train-00000-of-00008.parquet → train."""
    name = path.name
    for ends in (COMPRESSED, tuple(NAMES)):
        for end in ends:
            name = name[: -len(end)] if name.lower().endswith(end) and len(name) > len(end) else name
    return re.sub(r"-\d{5}-of-\d{5}$", "", name)


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder that hold rows, by name; others are told."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits") or []
        named = ", ".join(str(folder / str(split)) for split in splits)
        raise ValueError(f"--input: {folder} holds several splits: name one of them ({named})")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder)
    if prepared := store_folders(folder):
        raise ValueError(f"--input: {prepared[0]} was prepared by this tool: name the files that it was made of")
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    inside = {path: path.relative_to(folder).parts for path in every}
    hidden = [path for path, parts in inside.items() if any(part.startswith(".") for part in parts)]
    kept = [path for path in every if path not in hidden and named_kind(path.name) and path.name not in _NO_ROWS]
    if not kept:
        raise ValueError(f"--input: {folder} holds no file with rows ({', '.join(NAMES)}): name the files")
    _refuse_splits(folder, [inside[path] for path in kept])
    if left_out := [str(path.relative_to(folder)) for path in every if path not in kept and path not in hidden]:
        more = f" and {len(left_out) - NUM_TOLD} more" if len(left_out) > NUM_TOLD else ""
        _note(f"{folder}: {len(kept)} files are read; left out: {', '.join(left_out[:NUM_TOLD])}{more}")
    return kept


def _refuse_splits(folder: Path, inside: list[tuple[str, ...]]) -> None:
    """Whoever names a whole data set of the Hugging Face hub would train on its test rows."""
    splits = {
        split: parts
        for parts in inside
        for split in _SPLITS
        if split in parts[:-1] or re.match(rf"{split}([-_.]|$)", parts[-1])
    }
    if len(splits) > 1:
        first = next(iter(splits.values()))
        example = folder.joinpath(*first[:-1], "train*")
        raise ValueError(
            f"--input: {folder} holds several splits ({', '.join(sorted(splits))}): name the files, such as '{example}'"
        )


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets.save_to_disk` wrote."""
    state = _json(folder / "state.json")
    try:
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"--input: {folder / 'state.json'} does not name its files: save the data set again"
        ) from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"--input: {folder} has rows selected by indices: save it again after flatten_indices()")
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ValueError(f"--input: {folder} lacks {file.name}, which its state.json names: copy it again")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--input: {path} is not JSON ({error}): save the data set again") from error
    return content if isinstance(content, dict) else {}


def _note(text: str) -> None:
    print(f"note: --input: {text}", file=sys.stderr, flush=True)
