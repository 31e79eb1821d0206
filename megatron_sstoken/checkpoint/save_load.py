"""Checkpoints: megatron's `dist_checkpointing`, complete or absent, resumable on any layout.

A checkpoint is a folder `step_<number>` that appears by renaming, once everything in it is on disk.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sstoken.config import LoraSettings, SettingsError
from megatron_sstoken.device import compute_device
from megatron_sstoken.model.build import Model, fuse_adamw
from megatron_sstoken.model.lora import is_adapter

_STATE_FILE = "sstoken.json"
_NAME = re.compile(r"step_(\d+)")
_EXTRA = "_extra_state"  # Transformer Engine's name for the scales and largest values of FP8 training


@dataclass(frozen=True)
class RunIdentity:
    """What decides which rows a step holds; a run resumes only where all of it is equal."""

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
    base_fingerprint: str
    """Of the files of the base weights."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    step: int
    """Optimizer steps done; the next global batch has this number."""
    identity: RunIdentity | None
    """None for a conversion, which no run made."""
    hf_path: str
    """Hugging Face folder that the architecture and the tokenizer came from."""
    num_rows: int = 0
    """Rows of the whole run; the last batch may be filled up with empty ones."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Settings of selection and history, and the starting weights: told where a resumed run changes them."""
    adapters: AdapterIdentity | None = None
    """Set where the checkpoint holds adapters (and their optimizer state) alone."""


def checkpoint_steps(directory: str) -> dict[int, Path]:
    """Complete checkpoints under `directory`: step → folder, ascending."""
    if not os.path.isdir(directory):
        return {}
    found = {
        int(match[1]): path
        for path in Path(directory).iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / _STATE_FILE).is_file()
    }
    return dict(sorted(found.items()))


def read_run_state(folder: Path) -> RunState:
    """The state that a checkpoint folder describes."""
    with open(folder / _STATE_FILE, encoding="utf-8") as file:
        content = json.load(file)
    content.pop("split", None)
    identity = content.pop("identity")
    return RunState(
        identity=RunIdentity(**identity) if identity else None, **(content | {"adapters": read_adapters(folder)})
    )


def write_run_state(folder: Path, state: RunState, split: list) -> None:
    """Describe a checkpoint folder; written last, its file says that the checkpoint is whole."""
    with open(folder / _STATE_FILE, "w", encoding="utf-8") as file:
        json.dump(asdict(state) | {"split": split}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_adapters(folder: Path) -> AdapterIdentity | None:
    """The adapters that a checkpoint folder holds; None if it holds whole weights."""
    with open(folder / _STATE_FILE, encoding="utf-8") as file:
        adapters = json.load(file).get("adapters")
    return AdapterIdentity(**adapters) if adapters else None


def read_split(folder: Path) -> list:
    """`_split` of the run that made a checkpoint."""
    with open(folder / _STATE_FILE, encoding="utf-8") as file:
        return json.load(file)["split"]


def resolve_checkpoint(path: str) -> Path:
    """A checkpoint folder itself, or the newest complete one below it. Raises ValueError if there is none."""
    if os.path.isfile(os.path.join(path, _STATE_FILE)):
        return Path(path)
    steps = checkpoint_steps(path)
    if not steps:
        raise ValueError(f"{path} holds no complete checkpoint (a folder step_<number> with {_STATE_FILE})")
    return steps[max(steps)]


def save_checkpoint(
    directory: str,
    state: RunState,
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    keep: int,
) -> Path:
    """Save everything that resuming needs, then drop all but the `keep` newest checkpoints (0 keeps all).

    All ranks call it. Without an optimizer only the weights are saved (conversion); of a model with adapters these alone.
    """
    assert (state.adapters is not None) == model.has_adapters
    final = Path(directory) / f"step_{state.step:07d}"
    partial = Path(directory) / f"step_{state.step:07d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=model.layout.control)
    content = _sharded_state(model, optimizer, scheduler, adapters=model.has_adapters, is_loading=False)
    content["random"] = _random_states(model)
    dist_checkpointing.save(content, str(partial), validate_access_integrity=True)
    dist.barrier(group=model.layout.control)
    if dist.get_rank() == 0:
        write_run_state(partial, state, _split(model))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        steps = checkpoint_steps(directory)
        for step in list(steps)[: -keep or None] if keep else []:
            shutil.rmtree(steps[step])
    dist.barrier(group=model.layout.control)
    return final


def load_checkpoint(
    folder: Path,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> RunState:
    """Load weights and, where given, optimizer and scheduler, on any layout. All ranks call it.

    A checkpoint of adapters fills the adapters of a model and nothing else; any other checkpoint all but
    these. Random states belong to processes: they come back where the layout is as it was.
    """
    adapters = read_adapters(folder) is not None
    wanted = _sharded_state(model, optimizer, scheduler, adapters=adapters, is_loading=True)
    same_split = read_split(folder) == _split(model)
    if optimizer is not None and same_split:
        wanted["random"] = _random_states(model)
    state, _, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_UNEXPECTED)
    _require_only_extra(absent, folder)
    for name, chunk in zip(_chunk_names(model), model.unwrapped, strict=True):
        _load_chunk(chunk, state[name], adapters=adapters)
    if optimizer is not None:
        model.needs_calibration = False  # the scales of the run are in its checkpoint
        _load_optimizer(optimizer, state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if "random" in wanted:
        _set_random_states(state["random"])
    return read_run_state(folder)


def _load_chunk(chunk: torch.nn.Module, state: dict[str, Any], *, adapters: bool) -> None:
    """Load the adapters of a chunk, or every weight but them.

    Transformer Engine's state of FP8 scaling is taken where it is there.
    """
    keys = chunk.load_state_dict(state, strict=False)
    needed = [name for name in keys.missing_keys if is_adapter(name) == adapters and not name.endswith(_EXTRA)]
    wrong = [*keys.unexpected_keys, *needed]
    assert not wrong, f"weights that do not fit the model: {wrong}"


def _require_only_extra(absent: set[str], folder: Path) -> None:
    """Raise SettingsError where a checkpoint lacks more than state of FP8 scaling, which not every run has."""
    if lacking := sorted(name for name in absent if not name.endswith(_EXTRA)):
        raise SettingsError([f"{folder} lacks {', '.join(lacking[:5])}: it is of another model, or damaged"])


def check_identity(folder: Path, expected: RunIdentity, num_rows: int, lora: LoraSettings) -> None:
    """Raise SettingsError if the checkpoint was made on other data or in another order, naming what differs.

    So is a longer run than the one that ended with a batch filled up with empty rows: it would miss those rows.
    """
    state = read_run_state(folder)
    identity = state.identity
    if identity is None:
        raise SettingsError(
            [f"cannot resume from {folder}: it is a conversion; name it as model.checkpoint to start from it"]
        )
    found = asdict(identity)
    setting = {
        "data_fingerprint": "data.train",
        "sequence_length": "data.sequence_length",
        "too_long": "data.too_long",
        "packing": "data.packing",
        "shuffle": "data.shuffle",
        "seed": "training.seed",
        "global_batch_size": "training.global_batch_size",
    }
    differing = [
        f"cannot resume from {folder}: it was made with {setting[name]}={found[name]}, now {value}: "
        "use the same, or another checkpoint.directory"
        for name, value in asdict(expected).items()
        if found[name] != value
    ]
    differing += adapter_problems(f"cannot resume: {folder}", state.adapters, lora)
    if lora.rank and state.adapters is None:
        differing.append(
            f"cannot resume from {folder}: it holds whole weights, and lora.rank={lora.rank} trains adapters: use lora.rank=0, "
            "or another checkpoint.directory and this as model.checkpoint"
        )
    if state.step * identity.global_batch_size > state.num_rows and num_rows > state.num_rows:
        differing.append(
            f"cannot resume from {folder}: its run of {state.num_rows} rows ended with a batch that is not full, so that "
            "a longer one would miss rows: start it with another checkpoint.directory and model.checkpoint"
        )
    if differing:
        raise SettingsError(differing)


def adapter_problems(owner: str, saved: AdapterIdentity | None, lora: LoraSettings) -> list[str]:
    """Why adapters as `lora` sets them cannot be filled from a checkpoint of adapters; empty also if it holds none.

    `owner`: what messages call the checkpoint, as "model.checkpoint=PATH".
    """
    if saved is None:
        return []
    if lora.rank == 0:
        return [
            f"{owner} holds adapters, and lora.rank=0 makes none: set lora.rank={saved.rank}, lora.alpha={saved.alpha:g} and "
            f"lora.targets=[{', '.join(saved.targets)}], or merge them with tools/convert_checkpoint.py to-hf --merge"
        ]
    pairs = {
        "rank": (saved.rank, lora.rank),
        "alpha": (saved.alpha, lora.alpha),
        "targets": (sorted(saved.targets), sorted(lora.targets)),
    }
    return [
        f"{owner} holds adapters made with lora.{name}={old}, now {new}: use the same"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def _chunk_names(model: Model) -> list[str]:
    return [f"model{index}" for index in range(len(model.unwrapped))]


def _sharded_state(model, optimizer, scheduler, *, adapters: bool, is_loading: bool) -> dict[str, Any]:
    """The state to save or load: of the adapters, or of all but them."""
    metadata = {
        # One tensor of optimizer state for each parameter: the only form that moves between all layouts.
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": model.layout.groups.dp_cp,
    }
    chunks = {
        name: {
            key: value
            for key, value in chunk.sharded_state_dict(metadata=metadata).items()
            if is_adapter(key) == adapters
        }
        for name, chunk in zip(_chunk_names(model), model.unwrapped, strict=True)
    }
    state: dict[str, Any] = dict(chunks)
    if optimizer is not None:
        _prepare_adam_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata)
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    return state


def _split(model: Model) -> list:
    """What random states depend on: the layout, and the kind of device."""
    layout = model.layout
    return [layout.tensor_size, layout.pipeline_size, layout.groups.dp_cp.size(), compute_device().type]


def _random_states(model: Model) -> ShardedObject:
    """The generators that dropout draws from: one set for each process."""
    states = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    layout = model.layout
    sizes = (layout.tensor_size, layout.pipeline_size, layout.groups.dp_cp.size())
    place = (layout.tensor_rank, layout.pipeline_rank, layout.groups.dp_cp.rank())
    return ShardedObject("random", states, sizes, place)


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[tuple[MegatronOptimizer, torch.optim.Optimizer]]:
    """Those of megatron's optimizers that run on torch's own AdamW, as they do without apex and Transformer Engine."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [(part, part.optimizer) for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


def _prepare_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW its empty state where no step has made it: megatron asserts that it is there."""
    for _, inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state.setdefault(
                    parameter,
                    {
                        "step": torch.zeros((), device=parameter.device),  # there, because AdamW is fused
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    },
                )


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict`, in two parts where torch's AdamW runs.

    megatron-core 0.16 looks for AdamW's `step`, a number, among the stored tensors. It is in the parameter groups, from
    which the first part takes it; so it is put aside while the second part loads the tensors.
    """
    on_torch = _torch_optimizers(optimizer)
    if not on_torch:
        optimizer.load_state_dict(state)
        return
    # A mixture of experts has two optimizers, whose states stand under their numbers.
    states = [state] if len(on_torch) == 1 else [state[index] for index in range(len(on_torch))]
    tensors = [part_state.pop("param_state") for part_state in states]
    optimizer.load_state_dict(state)
    fuse_adamw(optimizer)  # whatever the checkpoint's groups say
    for (part, inner), part_tensors in zip(on_torch, tensors, strict=True):
        steps = {parameter: entry.pop("step") for parameter, entry in inner.state.items()}
        part.load_parameter_state_from_fully_reshardable(part_tensors)
        for parameter, step in steps.items():
            # A copy each: megatron hands one tensor to all, which AdamW would count up once for every parameter.
            inner.state[parameter]["step"] = step.to(parameter.device, copy=True)
