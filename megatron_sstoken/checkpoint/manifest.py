"""What a checkpoint folder says of itself: the run, its data and step, the adapters; and whether a run may resume from it."""

import functools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata

from megatron_sstoken.checkpoint.harmless import read_metadata
from megatron_sstoken.config import RENAMED, LoraSettings, Settings, SettingsError, adapter_scale
from megatron_sstoken.files import delete_old, write_durably
from megatron_sstoken.folders import RUN_FILE, SETTINGS_FILE, STATE_FILE
from megatron_sstoken.integrity import CHECKSUMS, checksum_of, differing, read_checksums, write_checksums
from megatron_sstoken.model.identity import ModelIdentity

PROBE = ".seen-by-all-"
"""Beginning of the name of a file that process 0 shows the others for a moment."""
_NUM_PACKS = "num_rows"  # what files call it since the first version
_NAME = re.compile(r"step_(\d+)")
_PART = re.compile(
    rf"__\d+_\d+\.distcp|\.metadata(\.tmp)?|metadata\.json|common\.pt|"
    rf"({'|'.join(map(re.escape, (STATE_FILE, CHECKSUMS, SETTINGS_FILE, RUN_FILE)))})(\.partial)?"
)
"""Files of a checkpoint: a folder that holds others is not deleted as left over."""
_DESCRIPTION = (STATE_FILE, ".metadata", "metadata.json", "common.pt")
"""The small files, which say what the large ones hold."""


@dataclass(frozen=True)
class RunIdentity:
    """What decides which packs a step holds; a run resumes only where all of it is equal."""

    data_fingerprint: str
    sequence_length: int
    too_long: str
    packing: bool
    shuffle: bool
    seed: int
    global_batch_size: int


@dataclass(frozen=True)
class AdapterIdentity:
    """What the adapters in a checkpoint are, and the weights that they belong to."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    base_checkpoint: str | None
    """megatron checkpoint that the base weights came from; None: the run's `hf_path`."""
    base: ModelIdentity | None = None
    """The base weights, and what is computed with them; None in checkpoints of versions before."""
    base_fingerprint: str = ""
    """What those have instead: of the bytes of the base's files, config.json among them."""
    rank_stabilized: bool = False
    train_whole: list[str] = field(default_factory=list)
    """Modules of the base that the checkpoint holds whole, as they were trained."""
    dora: bool = False

    @classmethod
    def of(cls, lora: LoraSettings, base: ModelIdentity, base_checkpoint: str | None = None) -> "AdapterIdentity":
        """Of adapters as `lora` sets them."""
        return cls(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=list(lora.targets),
            base_checkpoint=base_checkpoint,
            base=base,
            rank_stabilized=lora.rank_stabilized,
            train_whole=list(lora.train_whole),
            dora=lora.dora,
        )

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by."""
        return adapter_scale(self.alpha, self.rank, rank_stabilized=self.rank_stabilized)


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    step: int
    """Optimizer steps done; the next global batch has this number."""
    identity: RunIdentity | None
    """None for a conversion, which no run made."""
    hf_path: str
    """Hugging Face folder that the architecture and the tokenizer came from."""
    train: str = ""
    """Folder of the training data; empty where it is not known."""
    num_packs: int = 0
    """Packs of the whole run; the last batch may be filled up with empty ones."""
    lag: int = 0
    """Places of empty packs in full batches: those of a shorter run's last batch that this run went on from."""
    branch: int | None = None
    """The step that `checkpoint.resume` chose, of the start that this checkpoint descends from."""
    diverged: str | None = None
    """What says that the weights are of a run that had diverged, for people; None where nothing does."""
    drift: dict[str, float] = field(default_factory=dict)
    """State of the monitor of drift; empty where it has nothing to remember."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Settings of selection and history, and the starting weights: told where a resumed run changes them."""
    adapters: AdapterIdentity | None = None
    """Set where the checkpoint holds adapters (and their optimizer state) alone."""
    chat_template: str | None = None
    """Text of the chat template that the training data was prepared with; None: without one, or not known."""
    split: list = field(default_factory=list)
    """Layout and kind of device that random states belong to."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what that says of itself, read once."""

    folder: Path
    state: RunState

    @functools.cached_property
    def metadata(self) -> Metadata:
        """`.metadata`: which tensors it stores, and where. Raises ValueError as `read_metadata` does."""
        return read_metadata(self.folder)


def checkpoint_steps(directory: str) -> dict[int, Path]:
    """Complete checkpoints under `directory`: step → folder, ascending."""
    if not os.path.isdir(directory):
        return {}
    found = {
        int(match[1]): path
        for path in Path(directory).iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    }
    return dict(sorted(found.items()))


def without_description(directory: str) -> list[Path]:
    """Folders of checkpoints under `directory` that have lost their `sstoken.json`, or were not quite deleted."""
    if not os.path.isdir(directory):
        return []
    steps = [path for path in sorted(Path(directory).iterdir()) if _NAME.fullmatch(path.name)]
    return [path for path in steps if (path / ".metadata").is_file() and not (path / STATE_FILE).is_file()]


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that no run takes it, and none deletes it: to `step_<number>.<why>`. Returns its new place."""
    target = folder.with_name(f"{folder.name}.{why}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{why}-{number}")
    os.rename(folder, target)
    return target


def incomplete_steps(directory: str) -> list[Path]:
    """Folders of checkpoints under `directory` that were not finished, or whose deletion was not."""
    return [
        path
        for path in sorted(Path(directory).iterdir())
        if path.is_dir()
        and not path.is_symlink()
        and _NAME.fullmatch(path.name.removesuffix(".partial"))
        and (path.name.endswith(".partial") or not (path / STATE_FILE).is_file())
        and all(_PART.fullmatch(one.name) for one in path.iterdir())
    ]


def superfluous_steps(directory: str, keep: int) -> list[Path]:
    """Checkpoints that `checkpoint.keep` does not: neither the newest nor among the `keep` newest of a sound run."""
    steps = checkpoint_steps(directory)
    if not keep or not steps:
        return []
    sound = [step for step, folder in steps.items() if not has_diverged(folder)]
    kept = {max(steps), *sound[-keep:]}
    return [folder for step, folder in steps.items() if step not in kept]


def tidy(directory: str, keep: int) -> None:
    """Delete the checkpoints that `checkpoint.keep` does not keep, and what killed runs have left."""
    for folder in (*superfluous_steps(directory, keep), *incomplete_steps(directory)):
        drop(folder)
    delete_old(Path(directory), f"{PROBE}*")


def has_diverged(folder: Path) -> bool:
    """Whether a checkpoint is of a run that had diverged, or says nothing that can be read."""
    try:
        return read_run_state(folder).diverged is not None
    except ValueError:
        return True


def drop(folder: Path) -> None:
    """Delete a checkpoint folder, if it is there. What is left of it when this is interrupted does not count as complete."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def read_run_state(folder: Path) -> RunState:
    """The state that a checkpoint folder describes. Raises ValueError where its file is not one of ours."""
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        identity, adapters = content.pop("identity"), content.pop("adapters", None)
        num_packs = content.pop(_NUM_PACKS, 0)
        return RunState(
            identity=RunIdentity(**identity) if identity else None,
            adapters=_adapter_identity(**adapters) if adapters else None,
            num_packs=num_packs,
            **content,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error!r}): name another checkpoint") from error


def _adapter_identity(*, base: dict[str, Any] | None = None, **content: Any) -> AdapterIdentity:
    return AdapterIdentity(base=ModelIdentity(**base) if base else None, **content)


def write_run_state(folder: Path, state: RunState) -> None:
    """Describe a checkpoint folder; written last, its file says that the checkpoint is whole."""
    content = {_NUM_PACKS if name == "num_packs" else name: value for name, value in asdict(state).items()}
    write_durably(folder / STATE_FILE, json.dumps(content, indent=1))


def resolve_checkpoint(path: str) -> Path:
    """A checkpoint folder itself, or the newest complete one below it. Raises ValueError if there is none."""
    if os.path.isfile(os.path.join(path, STATE_FILE)):
        return Path(path)
    steps = checkpoint_steps(path)
    if not steps:
        raise ValueError(
            f"{path} holds no complete checkpoint (a folder step_<number> with {STATE_FILE}): name another folder"
        )
    return steps[max(steps)]


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint of a folder, or the newest complete one below it.

    Raises ValueError if there is none, if what describes it is damaged, or if the newest is of a run that had diverged.
    """
    folder = resolve_checkpoint(path)
    require_description(folder)
    found = Checkpoint(folder, read_run_state(folder))
    if found.state.diverged is not None and not os.path.isfile(os.path.join(path, STATE_FILE)):
        raise ValueError(
            f"{folder} is of a run that had diverged ({found.state.diverged}): name a checkpoint from before it, or this very "
            "folder to take it nevertheless"
        )
    return found


def require_description(folder: Path) -> None:
    """Raise ValueError where the small files that describe a checkpoint are not as they were written."""
    checksums = read_checksums(folder) or {}
    if problems := differing(folder, {name: checksums[name] for name in _DESCRIPTION if name in checksums}):
        raise ValueError(f"{problems[0]}: name another checkpoint")


def check_identity(checkpoint: Checkpoint, expected: RunIdentity, settings: Settings) -> None:
    """Raise SettingsError if the checkpoint was made on other data or in another order, naming what differs."""
    folder, state, lora = checkpoint.folder, checkpoint.state, settings.lora
    identity = state.identity
    if identity is None:
        raise SettingsError(
            [f"cannot resume from {folder}: it is a conversion; name it as model.checkpoint to start from it"]
        )
    found = asdict(identity)
    setting = {
        "sequence_length": "data.sequence_length",
        "too_long": "data.too_long",
        "packing": "data.packing",
        "shuffle": "data.shuffle",
        "seed": "training.seed",
        "global_batch_size": "training.global_batch_size",
    }
    differing = []
    if found["data_fingerprint"] != expected.data_fingerprint:
        before, now = state.train or "another folder", settings.data.train
        again = " as it was before it was prepared anew" if before == os.path.abspath(now or "") else ""
        differing.append(
            f"cannot resume from {folder}: it was trained on the data of {before}{again}, and data.train={now} holds other "
            "data: name another checkpoint.directory for it, or that data to go on"
        )
    differing += [
        f"cannot resume from {folder}: it was made with {setting[name]}={found[name]}, now {value}: "
        "use the same, or another checkpoint.directory"
        for name, value in asdict(expected).items()
        if name in setting and found[name] != value
    ]
    differing += adapter_problems(f"cannot resume: {folder}", state.adapters, lora)
    if lora.rank and state.adapters is None:
        differing.append(
            f"cannot resume from {folder}: it holds whole weights, and lora.rank={lora.rank} trains adapters: use lora.rank=0, "
            "or another checkpoint.directory and this as model.checkpoint"
        )
    if differing:
        raise SettingsError(differing)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that changed, as 'selection.rho: 0.6 → 0.9'."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new and name in before and name in now:
            found.append(f"{prefix}{name}: {old} → {new}")
    return found


def renamed(objective: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint by their names of today."""
    found = {section: dict(values) for section, values in objective.items()}
    for (section, old), new in RENAMED.items():
        if old in found.get(section, {}):
            found[section][new] = found[section].pop(old)
    return found


def mark_diverged(directory: str, step: int, problem: str) -> None:
    """Say of the checkpoint of `step`, if there is one, that what comes after it is not finite."""
    folder = checkpoint_steps(directory).get(step)
    if folder is None:
        return
    write_run_state(folder, replace(read_run_state(folder), diverged=problem))
    if checksums := read_checksums(folder):
        write_checksums(folder, checksums | {STATE_FILE: checksum_of(folder / STATE_FILE)})


def _whole(saved: AdapterIdentity) -> str:
    return f", lora.train_whole=[{', '.join(saved.train_whole)}]" if saved.train_whole else ""


def adapter_problems(owner: str, saved: AdapterIdentity | None, lora: LoraSettings) -> list[str]:
    """Why adapters as `lora` sets them cannot be filled from a checkpoint of adapters; empty also if it holds none.

    `owner`: what messages call the checkpoint, as "model.checkpoint=PATH".
    """
    if saved is None:
        return []
    if lora.rank == 0:
        return [
            f"{owner} holds adapters, and lora.rank=0 makes none: set lora.rank={saved.rank}, lora.alpha={saved.alpha:g}"
            f"{', lora.rank_stabilized=true' * saved.rank_stabilized}{', lora.dora=true' * saved.dora}{_whole(saved)} and "
            f"lora.targets=[{', '.join(saved.targets)}], or merge them with tools/convert_checkpoint.py to-hf --merge"
        ]
    pairs = {
        "rank": (saved.rank, lora.rank),
        "alpha": (saved.alpha, lora.alpha),
        "rank_stabilized": (saved.rank_stabilized, lora.rank_stabilized),
        "dora": (saved.dora, lora.dora),
        "targets": (sorted(saved.targets), sorted(lora.targets)),
        "train_whole": (sorted(saved.train_whole), sorted(lora.train_whole)),
    }
    return [
        f"{owner} holds adapters made with lora.{name}={old}, now {new}: use the same"
        for name, (old, new) in pairs.items()
        if old != new
    ]
