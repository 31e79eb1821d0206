"""What lies in folders of ours, and what a path is that is not what it should be; nothing heavy is imported to tell it."""

import os
import re
import tempfile
from pathlib import Path

from megatron_sstoken.files import existing_above
from megatron_sstoken.words import did_you_mean

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")
_OF_A_MACHINE = frozenset(
    "data datasets model models run runs checkpoints out output outputs work quickstart tmp".split()
)
"""First parts of relative paths that no one takes for a name on the hub."""
_ROWS = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".gz", ".zst", ".bz2", ".xz")
_MANIFEST = "manifest.json"
STATE_FILE = "sstoken.json"
"""In every checkpoint: what it is of."""
SETTINGS_FILE, RUN_FILE = "settings.yaml", "run.json"
"""In the folder of a run, and in each of its checkpoints: what the run is, for people."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""In a PEFT folder."""
METRICS, RECORDS, WATCHED = "metrics.jsonl", "records", "watched"
"""In the folder of a run's logs: its figures by step, and folders of token records."""


def local_model(path: str) -> str:
    """`path`; where it is the name of a model on the hub that is in this machine's cache, the folder of its newest snapshot.

    Nothing is asked of the hub.
    """
    if os.path.exists(path) or not _is_hub_name(path):
        return path
    from huggingface_hub.file_download import try_to_load_from_cache

    for name in ("config.json", ADAPTER_CONFIG, "tokenizer_config.json"):
        found = try_to_load_from_cache(path, name)
        if isinstance(found, str):
            return os.path.dirname(found)
    return path


def hub_name(path: str) -> str | None:
    """The name on the hub of a folder of its cache; None of others."""
    found = _IN_CACHE.search(os.path.abspath(path))
    return f"{found[1]}/{found[2]}" if found else None


def _is_hub_name(path: str) -> bool:
    first = path.partition("/")[0]
    return _HUB_NAME.fullmatch(path) is not None and first not in _OF_A_MACHINE and not os.path.exists(first)


def model_folder_problem(path: str) -> str | None:
    """Why `path` is no Hugging Face folder, and what to name instead; None if it has a config.json."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return None
    if folder.is_file():
        if path.endswith(".gguf"):
            return f"{path} is a GGUF file: {_from_gguf(path)}"
        return f"{path} is a file: name a Hugging Face folder (config.json, *.safetensors, tokenizer.json)"
    if not folder.is_dir():
        return missing(path, "name the folder of a Hugging Face checkpoint", "model")
    if found := sorted(folder.glob("*.gguf")):
        return f"{path} has no config.json, it holds {found[0].name}: {_from_gguf(str(found[0]))}"
    if found := sorted(folder.glob("snapshots/*/config.json")):
        return f"{path} is a folder of the hub's cache: name {found[-1].parent}"
    if holds_checkpoints(folder):
        return (
            f"{path} has no config.json, it holds checkpoints of a run: name it with model.checkpoint, and here the Hugging "
            "Face folder that the run started from"
        )
    if found := sorted(folder.glob("*/config.json")):
        return f"{path} has no config.json: did you mean {found[0].parent}?"
    return f"{path} has no config.json: name the folder of a Hugging Face checkpoint"


def data_folder_problem(path: str) -> str | None:
    """Why `path` is no prepared folder, and the command that makes one; None if it has a manifest."""
    folder = Path(path)
    if (folder / _MANIFEST).is_file():
        return None
    if folder.is_file():
        return f"{path} is not a prepared folder: {_prepare(path)}"
    if not folder.is_dir():
        return missing(path, "make it with tools/prepare_data.py", "dataset")
    if (folder / "train" / _MANIFEST).is_file():
        return f"{path} holds several prepared folders: name one, as {folder / 'train'}"
    if any(one.suffix in _ROWS for one in folder.iterdir() if one.is_file()):
        return f"{path} is not a prepared folder: {_prepare(path)}"
    return f"{path} is incomplete: it has no {_MANIFEST}: make it with tools/prepare_data.py"


def missing(path: str, remedy: str, kind: str) -> str:
    """What to do about a path that does not exist; `kind`: what the hub calls it, model or dataset."""
    if _is_hub_name(path):
        option = "" if kind == "model" else f" --repo-type {kind}"
        place = f"{kind}s/{path.rpartition('/')[2]}"
        then = "and name that folder" if kind == "model" else f"then {_prepare(place)}"
        return (
            f"{path} does not exist here, and looks like a name on the Hugging Face hub: "
            f"`hf download {path}{option} --local-dir {place}`, {then}"
        )
    beside = os.path.dirname(os.path.normpath(path))
    near = did_you_mean(os.path.basename(os.path.normpath(path)), _names(beside or "."))
    return f"{path} does not exist: {near}{remedy}"


def writing_problem(setting: str, path: str) -> str | None:
    """Why nothing can be made at `path`, or None. Nothing is left there: a file without a name is tried."""
    existing = existing_above(path)
    if os.path.isfile(path):
        return f"{setting}={path} is a file that exists: remove it, or name another place"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{setting}={path} cannot be written: {existing} is not a writable folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{setting}={path} cannot be written: {existing}: {error.strerror}: name another folder"


def _from_gguf(path: str) -> str:
    return (
        f"make a Hugging Face folder of it with `python tools/convert_checkpoint.py from-gguf --gguf {path} --output FOLDER`, "
        "and name that"
    )


def _prepare(path: str) -> str:
    return (
        f"make one with `python tools/prepare_data.py --input {path} --tokenizer MODEL --output FOLDER`, and name that"
    )


def holds_checkpoints(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or holds those of a run."""
    return (folder / STATE_FILE).is_file() or any(folder.glob(f"step_*/{STATE_FILE}"))


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
