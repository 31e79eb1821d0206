"""The folder that preparation makes: who may make it, what it may replace, and what it holds."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sstoken.data.column import COLUMN_FOLDERS
from megatron_sstoken.data.store import MANIFEST, STORE_FORMAT
from megatron_sstoken.files import existing_above
from megatron_sstoken.integrity import CHECKSUMS
from megatron_sstoken.lock import Lock

SKIPPED = "skipped.jsonl"
TRAIN, VALIDATION = "train", "validation"
_OWN_FILES = frozenset(
    (
        "tokens.bin",
        "tokens.idx",
        "roles.bin",
        "roles.idx",
        "rows.npy",
        "response_counts.npy",
        "labels.npy",
        "weights.bin",
        MANIFEST,
        CHECKSUMS,
        SKIPPED,
    )
)


def store_folders(output: Path) -> list[Path]:
    """Folders of samples in what preparation made: itself, or `train` and `validation` in it; [] if it made neither."""
    if output.is_symlink():
        return []
    parts = [output / TRAIN, output / VALIDATION]
    return [output] if _is_store(output) else parts if all(map(_is_store, parts)) else []


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError where `output` cannot be made: something is there, or a file where a folder must be."""
    above = existing_above(output.parent)
    if not above.is_dir():
        raise ValueError(f"--output: {output} lies below {above}, which is a file: choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--output: this user cannot write to {above}: choose another folder")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output: {output} exists: choose another folder or pass --overwrite")
    folders = store_folders(output)
    if not folders:
        raise ValueError(f"--output: {output} was not made by this tool, so it is not overwritten: remove it yourself")
    if folders != [output]:
        _refuse_foreign(output, output, {TRAIN, VALIDATION, SKIPPED})
    for folder in folders:
        _refuse_foreign(output, folder, _OWN_FILES | {*COLUMN_FOLDERS})
        for path in (lock for name in COLUMN_FOLDERS for lock in (folder / name).glob("*.lock")):
            if holder := Lock(path).holder():
                raise ValueError(
                    f"--output: {output} is in use, {holder} is filling {path.parent}: wait for it, or stop it"
                )


def _refuse_foreign(output: Path, folder: Path, own: frozenset[str] | set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in own:
            raise ValueError(
                f"--output: {path} was not made by this tool, so {output} is not overwritten: move it away"
            )


@contextmanager
def sole_maker(output: Path) -> Iterator[None]:
    """Within, this process alone makes `output`. Raises ValueError where another one does.

    Folders above it that this had to make are gone again where the block fails.
    """
    existing = existing_above(output.parent)
    made = [path for path in (output.parent, *output.parent.parents) if existing in Path(os.path.abspath(path)).parents]
    try:
        with Lock(output.with_name(f"{output.name}.lock")) as lock:
            if holder := lock.take():
                raise ValueError(f"--output: {output} is being made by {holder}: wait for it, or stop it")
            yield
            for old in output.parent.glob(f"{output.name}.replaced-*"):  # a run that was killed had put it aside
                if store_folders(old):
                    shutil.rmtree(old)
    finally:
        if not output.exists():
            for path in made:
                try:
                    path.rmdir()
                except OSError:
                    break


def _is_store(path: Path) -> bool:
    """Whether a folder has a manifest of ours, of whatever version."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not path.is_symlink() and isinstance(content, dict) and content.get("format") == STORE_FORMAT
