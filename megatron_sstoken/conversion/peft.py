"""A PEFT folder → a checkpoint of adapters, which a LoRA run starts from (`model.checkpoint`)."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_sstoken import __version__
from megatron_sstoken.checkpoint.manifest import AdapterIdentity, RunState
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.config import LoraSettings, LoraTarget, WholeModule
from megatron_sstoken.config.model import LINEARS
from megatron_sstoken.conversion.contents import Parameter, adapter_contents
from megatron_sstoken.conversion.output import write_checkpoint
from megatron_sstoken.conversion.work import ConversionOptions, refuse_existing
from megatron_sstoken.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, local_model
from megatron_sstoken.model.dtypes import SAFETENSORS_NAMES
from megatron_sstoken.model.families import Architecture, Split, read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.lora_places import rows_of_fused
from megatron_sstoken.model.lora_targets import (
    EMBEDDING,
    EMBEDDING_MATRICES,
    FUSED,
    OTHER_NAMES,
    STACKS,
    WHOLE_TENSORS,
    expert_of,
    peft_embedding_name,
    peft_layer,
    peft_whole_name,
    stack_prefixes,
    stacked_alpha,
)
from megatron_sstoken.model.weight_files import HuggingFaceWeights, open_safetensors
from megatron_sstoken.model.weights import interleaved

_UNSUPPORTED = {
    "trainable_token_indices": "tokens trained beside the adapters",
    "lora_bias": "adapters with a bias",
    "layer_replication": "replicated layers",
    "exclude_modules": "excluded linears",
    "alora_invocation_tokens": "adapters that a phrase switches on",
    "fan_in_fan_out": "transposed weights",
}
"""Fields of adapter_config.json that change what adapters compute → what they stand for."""
_LAYER = r"base_model\.model\.model\.layers\.\d+\."
_TENSOR = re.compile(
    _LAYER + r"\w+(?:\.experts\.\d+|\.shared_experts?)?\.(\w+)\.(?:lora_[AB]\.weight|lora_magnitude_vector)"
)
_STACK = re.compile(_LAYER + r"mlp\.experts\.((?:base_layer\.)?)lora_[AB]\.weight")
_MERGE, _OWN = "merge the adapters into their base with PEFT", "name the adapters' own base with --hf"


@dataclass(frozen=True)
class _Place:
    """A part of a matrix in a PEFT folder."""

    name: str
    linear: str
    """The Hugging Face linear that the adapter is on."""
    shape: list[int]
    """Of the whole matrix."""
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    zeros: tuple[slice, ...] = ()
    """Columns in which the rows hold nothing."""


class PeftFolder:
    """The adapters of a PEFT folder. Raises ValueError where it holds anything that adapters here do not compute."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self._config_file, self._weights_file = self.folder / ADAPTER_CONFIG, self.folder / ADAPTER_WEIGHTS
        for path in (self._config_file, self._weights_file):
            if not path.is_file():
                raise ValueError(f"{folder} has no {path.name}: name a PEFT folder with safetensors")
        self._config = self._read_config()
        self._weights = open_safetensors(str(self._weights_file))
        self._names = set(self._weights.keys())
        whole = [module for module in get_args(WholeModule) if module in (self._config.get("modules_to_save") or [])]
        named = {name.rpartition(".")[2] for name in self._config.get("target_parameters") or []}
        self._stacks = stack_prefixes(named)
        """Tensor of all experts that has an adapter → what the names of its matrices have before `lora_A`."""
        self._absent: frozenset[str] = frozenset()
        """Matrices of shared experts and dense layers, where `target_parameters` names tensors of all experts alone: zeros, A
        and B, which training leaves as they are."""
        in_stacks = {
            name for name in self._names if (found := _STACK.fullmatch(name)) and found[1] in self._stacks.values()
        }
        of_embedding = {peft_embedding_name(matrix) for matrix in EMBEDDING_MATRICES.values()} & self._names
        base = {peft_embedding_name("base_layer.weight")} & self._names if of_embedding else set()
        # PEFT saves the embedding itself beside its adapter.
        self._copies = dict.fromkeys(base, WHOLE_TENSORS[EMBEDDING])
        """Tensor of the base that the folder holds, too → its name in the base."""
        self._names -= base
        if of_embedding and self._config.get("ensure_weight_tying"):
            raise ValueError(
                f"{self._config_file}: ensure_weight_tying of an adapter of the embedding, which gives the head one, too, is "
                "not supported, and PEFT merges such adapters twice: train them without it"
            )
        others = self._names - in_stacks - of_embedding - {peft_whole_name(module) for module in whole}
        matches = {name: _TENSOR.fullmatch(name) for name in others}
        self._linears = {match[1] for match in matches.values() if match} | self._stacks.keys()
        self._linears |= {EMBEDDING} if of_embedding else set()
        known = {*LINEARS, *FUSED, *OTHER_NAMES, EMBEDDING}
        unknown = sorted(name for name, match in matches.items() if match is None) + sorted(self._linears - known)
        if unknown or not self._linears:
            what = f"holds {', '.join(unknown[:3])}" if unknown else "holds no adapters"
            raise ValueError(
                f"{self._weights_file} {what}: only adapters of {', '.join(sorted(known))} are read: {_MERGE}"
            )
        targets = {part for name in self._linears for part in FUSED.get(name, (OTHER_NAMES.get(name, name),))}
        self.lora = LoraSettings(
            rank=self._config["r"],
            alpha=float(self._config["lora_alpha"]),
            dropout=float(self._config.get("lora_dropout") or 0.0),
            targets=[name for name in get_args(LoraTarget) if name in targets],
            rank_stabilized=bool(self._config.get("use_rslora")),
            train_whole=whole,
            dora=bool(self._config.get("use_dora")),
        )
        if problems := self.lora.problems():
            raise ValueError(f"{self._config_file}: {'; '.join(problems)}")
        self._stacked = self._stacked_linears()

    @property
    def named_base(self) -> str:
        """What the adapters call their base: a folder, or a name on the hub; empty where they do not say."""
        return self._config.get("base_model_name_or_path") or ""

    @property
    def base(self) -> str | None:
        """The folder of the weights that the adapters belong to, where they name one that is there, or in the hub's cache."""
        folder = local_model(self.named_base)
        return folder if os.path.isdir(folder) else None

    @property
    def fingerprint(self) -> str:
        return fingerprint_files([str(self._config_file), str(self._weights_file)])

    @property
    def dtype(self) -> torch.dtype:
        """What holds all matrices: BF16 where all are, else F32."""
        names = {self._weights.get_slice(name).get_dtype() for name in self._names}
        return torch.bfloat16 if names == {SAFETENSORS_NAMES[torch.bfloat16]} else torch.float32

    def matrix(self, parameter: Parameter, architecture: Architecture) -> torch.Tensor:
        """The matrix of an adapter's parameter."""
        place = self._place(parameter, architecture)
        if place.name in self._absent:
            return torch.zeros(parameter.shape, dtype=self.dtype)
        if parameter.rule.split is Split.VOCABULARY:
            real = self._weights.get_tensor(place.name)
            real = real.t() if place.linear == EMBEDDING and parameter.name in EMBEDDING_MATRICES else real
            return torch.cat([real, real.new_zeros(parameter.shape[0] - real.shape[0], real.shape[1])])
        one_axis = len(place.shape) == 1
        found = self._weights.get_tensor(place.name) if one_axis else self._rows(place)[:, place.columns]
        return interleaved(parameter.rule, [found], architecture).contiguous()

    def check(self, parameters: tuple[Parameter, ...], architecture: Architecture) -> None:
        """Raise ValueError unless the folder holds the matrices of all `parameters`, and no others."""
        named = {parameter.name: self._place(parameter, architecture) for parameter in parameters}
        places = list(named.values())
        if self._stacks:
            beside = {one.name for name, one in named.items() if ".mlp." in name and expert_of(name) is None}
            self._absent = frozenset() if beside & self._names else frozenset(beside)
        ties = architecture.tied_embeddings and bool(self.lora.train_whole)
        if ties:  # of one parameter the folder holds two copies
            self._require_both()
            shape = [architecture.vocabulary_size, architecture.hidden_size]
            places.append(_Place(peft_whole_name("lm_head"), "lm_head", shape))
        if self.lora.dora and (fused := self._linears & FUSED.keys()):
            raise ValueError(
                f"{self._config_file}: use_dora on {', '.join(sorted(fused))} (linears that fuse several) is not supported: "
                f"{_MERGE}"
            )
        if strange := self._linears - {place.linear for place in places}:
            raise ValueError(
                f"{self._weights_file} has adapters on {', '.join(sorted(strange))}, which the base does not have: {_OWN}"
            )
        for place in places:
            if place.name in self._absent:
                continue
            if place.name not in self._names:
                why = (
                    "modules_to_save names it"
                    if place.linear in self.lora.train_whole
                    else "adapters have to be whole, on every layer and expert"
                )
                raise ValueError(f"{self._weights_file} holds no {place.name}: {why}")
            shape = list(self._weights.get_slice(place.name).get_shape())
            if shape != place.shape:
                raise ValueError(
                    f"{self._weights_file}: {place.name} has shape {shape}, the base asks for {place.shape}: {_OWN}"
                )
            if place.zeros:
                self._require_blocks(place)
        if extra := self._names - {place.name for place in places}:
            raise ValueError(
                f"{self._weights_file} holds {min(extra)} ({len(extra)} such), for which the base has no place: {_OWN}"
            )
        if ties:
            self._require_one_table()

    def require_copies_of(self, base: HuggingFaceWeights) -> None:
        """Raise ValueError unless the embedding that the folder holds, if any, is that of the base."""
        for name, of_base in self._copies.items():
            ours, theirs = self._weights.get_tensor(name), base.slice(of_base)[:]
            if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
                raise ValueError(
                    f"{self._weights_file}: {name} is not the base's embedding, as where words were added to it: {_MERGE}"
                )

    def _require_both(self) -> None:
        """Raise ValueError unless both embedding and head were saved."""
        if len(self.lora.train_whole) == 1:
            raise ValueError(
                f"{self._config_file}: modules_to_save={self.lora.train_whole} parts embedding and head, which are one in "
                f"the base (tie_word_embeddings): {_MERGE}"
            )

    def _require_one_table(self) -> None:
        """Raise ValueError unless embedding and head are the same numbers."""
        embedding, head = (self._weights.get_tensor(peft_whole_name(module)) for module in self.lora.train_whole)
        if not torch.equal(embedding, head):
            raise ValueError(
                f"{self._weights_file}: embedding and head differ, which are one in the base (tie_word_embeddings): {_MERGE}"
            )

    def _stacked_linears(self) -> set[str]:
        """The fused linears that hold an adapter for each of their parts: A below one another, B along a diagonal.

        So `to-hf` writes them, with a rank and an alpha as many times as large. Raises ValueError for other patterns.
        """
        ranks, alphas = (  # PEFT's own patterns for experts begin as regular expressions
            {linear.removeprefix(r".*\."): said for linear, said in (self._config.get(f"{name}_pattern") or {}).items()}
            for name in ("rank", "alpha")
        )
        stacked, stabilized = set(), self.lora.rank_stabilized
        for linear in sorted({*ranks, *alphas}):
            number = len(FUSED.get(linear, ()))
            said = ranks.get(linear, self.lora.rank), alphas.get(linear, self.lora.alpha)
            if said == (number * self.lora.rank, stacked_alpha(self.lora.alpha, number, rank_stabilized=stabilized)):
                stacked.add(linear)
            elif said != (self.lora.rank, self.lora.alpha):
                raise ValueError(
                    f"{self._config_file}: rank_pattern, alpha_pattern (others for {linear}) is not supported: {_MERGE}"
                )
        return stacked

    def _place(self, parameter: Parameter, architecture: Architecture) -> _Place:
        """Where the folder has the matrix of an adapter's parameter. The parts of a fused linear share its A."""
        (name,) = parameter.rule.hugging_face
        if parameter.name in EMBEDDING_MATRICES:
            shapes = {"lora_embedding_A": [self.lora.rank, architecture.vocabulary_size]}
            matrix = EMBEDDING_MATRICES[parameter.name]
            return _Place(name, EMBEDDING, shapes.get(matrix, list(parameter.shape)))
        if parameter.rule.split is Split.VOCABULARY:
            return _Place(name, name.split(".")[-2], [architecture.vocabulary_size, parameter.shape[1]])
        linear, (target, matrix) = name.split(".lora_")[0].rpartition(".")[2], parameter.name.split(".")[-2:]
        shape, expert = list(parameter.shape), expert_of(parameter.name)
        if expert is not None and self._stacks:
            return self._place_in_stack(parameter, expert, architecture)
        if linear not in FUSED:
            return _Place(name, linear, shape)
        parts, rank = rows_of_fused(architecture, linear), self.lora.rank
        number = list(parts).index(target)
        blocks = self._blocks(linear, len(parts), 1)
        if matrix == "lora_A":
            return _Place(name, linear, [len(blocks) * rank, shape[1]], rows=blocks[number % len(blocks)])
        first = sum(list(parts.values())[:number])
        rows, own = slice(first, first + parts[target]), blocks.pop(number % len(blocks))
        return _Place(name, linear, [sum(parts.values()), (len(blocks) + 1) * rank], rows, own, tuple(blocks))

    def _blocks(self, linear: str, num_parts: int, num_experts: int, expert: int = 0) -> list[slice]:
        """The columns of B that hold the parts of a fused linear one after another, or the one block that all of them share;
        experts take turns."""
        width, number = self.lora.rank * num_experts, num_parts if linear in self._stacked else 1
        return [slice(part * width + expert, (part + 1) * width, num_experts) for part in range(number)]

    def _place_in_stack(self, parameter: Parameter, expert: int, architecture: Architecture) -> _Place:
        """Where an adapter of all experts has the matrix of one: A holds them below one another, B by turns in its columns."""
        target, matrix = parameter.name.split(".")[-2:]
        (stack,) = (name for name in STACKS if target in FUSED.get(name, (name,)))
        name = f"{peft_layer(parameter.layer)}.mlp.experts.{self._stacks.get(stack, '')}{matrix}.weight"
        parts, number, rank = FUSED.get(stack, (stack,)), architecture.num_experts, self.lora.rank
        part, blocks = parts.index(target), self._blocks(stack, len(parts), number, expert)
        width, block = len(blocks) * rank * number, part % len(blocks)
        if matrix == "lora_A":
            first = (expert * len(blocks) + block) * rank
            return _Place(name, stack, [width, parameter.shape[1]], slice(first, first + rank))
        outputs = parameter.shape[0]
        rows = slice(part * outputs, (part + 1) * outputs)
        if parameter.rule.stacked:  # in its order of outputs parts take turns
            rows = slice(part, None, len(parts))
        own = blocks.pop(block)
        return _Place(name, stack, [len(parts) * outputs, width], rows, own, tuple(blocks))

    def _rows(self, place: _Place) -> torch.Tensor:
        """The rows of a matrix that a part has, all columns."""
        if place.rows.step is not None:  # which slices of files do not know
            return self._weights.get_tensor(place.name)[place.rows]
        return self._weights.get_slice(place.name)[place.rows]

    def _require_blocks(self, place: _Place) -> None:
        """Raise ValueError unless the rows of one part use no A but their own."""
        rows = self._rows(place)
        if any(rows[:, columns].any() for columns in place.zeros):
            raise ValueError(
                f"{self._weights_file}: {place.name} has another rank than other linears, and its parts share it: {_MERGE}"
            )

    def _read_config(self) -> dict[str, Any]:
        path = self._config_file
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
            raise ValueError(f"{path} is not the configuration of LoRA adapters: only those are supported")
        problems = [f"{field} ({what})" for field, what in _UNSUPPORTED.items() if config.get(field)]
        if config.get("bias", "none") != "none":
            problems.append("bias (trained biases)")
        if other := sorted(set(config.get("modules_to_save") or []) - set(get_args(WholeModule))):
            problems.append(f"modules_to_save (whole modules beside the adapters: {', '.join(other)})")
        if config.get("layers_to_transform") is not None:
            problems.append("layers_to_transform (adapters on some layers)")
        if problems:
            raise ValueError(f"{path}: {', '.join(problems)} is not supported: {_MERGE}")
        return config


def from_peft(
    adapter: str, output: str, *, hf_path: str | None = None, options: ConversionOptions | None = None
) -> tuple[Path, LoraSettings]:
    """Write a checkpoint of adapters `output`/step_0000000 from a PEFT folder; with it come the settings that fit.

    `hf_path`: the Hugging Face folder of the base; default: the one that the adapters name. The matrices get one type: F32, or
    BF16 where all are. Raises ValueError for what cannot be read, does not fit the base, or computes anything else than LoRA,
    rsLoRA and DoRA on every layer, and for an output in the way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [adapter, *([hf_path] if hf_path else [])])
    folder = PeftFolder(adapter)
    base = hf_path or folder.base
    if base is None:
        named = folder.named_base
        said = f"{named}, which is not here, as its base" if named else "no base"
        raise ValueError(f"{adapter} names {said}: name the base's Hugging Face folder with --hf")
    architecture = read_architecture(base)
    contents = adapter_contents(architecture, folder.lora)
    folder.check(contents.parameters, architecture)
    folder.require_copies_of(HuggingFaceWeights(base))
    base_identity = WeightsSource(base).identity
    made_of = {
        "operation": "from-peft",
        "version": __version__,
        "source": folder.fingerprint,
        "base": asdict(base_identity),
    }
    costs = {parameter.name: 2 * parameter.numel * 4 for parameter in contents.parameters}
    state = RunState(
        step=0, identity=None, hf_path=os.path.abspath(base), adapters=AdapterIdentity.of(folder.lora, base_identity)
    )
    sources = [folder.folder] if options.verify else []
    read = partial(folder.matrix, architecture=architecture)
    written = write_checkpoint(output, made_of, contents, folder.dtype, costs, options, state, read, sources)
    return written, folder.lora
