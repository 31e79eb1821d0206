"""A PEFT folder → a checkpoint of adapters, which a LoRA run starts from (`model.checkpoint`)."""

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_sstoken import __version__
from megatron_sstoken.checkpoint.manifest import AdapterIdentity, RunState
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.config import LoraSettings, LoraTarget
from megatron_sstoken.conversion.contents import Parameter, adapter_contents
from megatron_sstoken.conversion.output import write_checkpoint
from megatron_sstoken.conversion.work import ConversionOptions, refuse_existing
from megatron_sstoken.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron_sstoken.model.dtypes import SAFETENSORS_NAMES
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.lora import TARGETS
from megatron_sstoken.model.weight_files import open_safetensors

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks that differ from linear to linear",
    "alpha_pattern": "scales that differ from linear to linear",
    "modules_to_save": "whole modules beside the adapters",
    "trainable_token_indices": "tokens trained beside the adapters",
    "lora_bias": "adapters with a bias",
    "layer_replication": "replicated layers",
    "exclude_modules": "excluded linears",
    "alora_invocation_tokens": "adapters that a phrase switches on",
    "fan_in_fan_out": "transposed weights",
}
"""Fields of adapter_config.json that change what adapters compute → what they stand for."""
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight")


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
        matches = {name: _TENSOR.fullmatch(name) for name in self._names}
        found = {match[1] for match in matches.values() if match}
        unknown = sorted(name for name, match in matches.items() if match is None) + sorted(found - TARGETS.keys())
        if unknown or not found:
            what = f"holds {', '.join(unknown[:3])}" if unknown else "holds no adapters"
            raise ValueError(f"{self._weights_file} {what}: only adapters of {', '.join(TARGETS)} are supported")
        self.lora = LoraSettings(
            rank=self._config["r"],
            alpha=float(self._config["lora_alpha"]),
            dropout=float(self._config.get("lora_dropout") or 0.0),
            targets=[name for name in get_args(LoraTarget) if name in found],
            rank_stabilized=bool(self._config.get("use_rslora")),
        )
        if problems := self.lora.problems():
            raise ValueError(f"{self._config_file}: {'; '.join(problems)}")

    @property
    def base(self) -> str | None:
        """The folder of the weights that the adapters belong to, where it names one that is there."""
        named = self._config.get("base_model_name_or_path")
        return named if named and os.path.isdir(named) else None

    @property
    def fingerprint(self) -> str:
        return fingerprint_files([str(self._config_file), str(self._weights_file)])

    @property
    def dtype(self) -> torch.dtype:
        """What holds all matrices: BF16 where all are, else F32."""
        names = {self._weights.get_slice(name).get_dtype() for name in self._names}
        return torch.bfloat16 if names == {SAFETENSORS_NAMES[torch.bfloat16]} else torch.float32

    def matrix(self, parameter: Parameter) -> torch.Tensor:
        """The matrix of an adapter's parameter."""
        (name,) = parameter.rule.hugging_face
        return self._weights.get_tensor(name)

    def check(self, parameters: tuple[Parameter, ...]) -> None:
        """Raise ValueError unless the folder holds the matrices of all `parameters`, and no others. Reads headers only."""
        for parameter in parameters:
            (name,) = parameter.rule.hugging_face
            if name not in self._names:
                raise ValueError(f"{self._weights_file} holds no {name}: adapters have to be on every layer")
            shape, wanted = list(self._weights.get_slice(name).get_shape()), list(parameter.shape)
            if shape != wanted:
                raise ValueError(
                    f"{self._weights_file}: {name} has shape {shape}, the base asks for {wanted}: name the adapters' own base "
                    "with --hf"
                )
        if len(self._names) != len(parameters):
            raise ValueError(
                f"{self._weights_file} holds {len(self._names)} matrices, the base has place for {len(parameters)}: "
                "name the adapters' own base with --hf"
            )

    def _read_config(self) -> dict[str, Any]:
        path = self._config_file
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
            raise ValueError(f"{path} is not the configuration of LoRA adapters: only those are supported")
        problems = [f"{field} ({what})" for field, what in _UNSUPPORTED.items() if config.get(field)]
        if config.get("bias", "none") != "none":
            problems.append("bias (trained biases)")
        if config.get("layers_to_transform") is not None:
            problems.append("layers_to_transform (adapters on some layers)")
        if problems:
            raise ValueError(
                f"{path}: {', '.join(problems)} is not supported: merge the adapters into their base with PEFT"
            )
        return config


def from_peft(
    adapter: str, output: str, *, hf_path: str | None = None, options: ConversionOptions | None = None
) -> tuple[Path, LoraSettings]:
    """Write a checkpoint of adapters `output`/step_0000000 from a PEFT folder; with it come the settings that fit.

    `hf_path`: the Hugging Face folder of the base; default: the one that the adapters name. The matrices get one type: F32, or
    BF16 where all are. Raises ValueError for what cannot be read, does not fit the base, or computes anything else than LoRA
    and rsLoRA on the linears of every layer, and for an output in the way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [adapter, *([hf_path] if hf_path else [])])
    folder = PeftFolder(adapter)
    base = hf_path or folder.base
    if base is None:
        raise ValueError(f"{adapter} names no base that is here: name its Hugging Face folder with --hf")
    architecture = read_architecture(base)
    contents = adapter_contents(architecture, folder.lora)
    folder.check(contents.parameters)
    lora = folder.lora
    identity = AdapterIdentity(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=list(lora.targets),
        base_checkpoint=None,
        base_fingerprint=WeightsSource(base).fingerprint(),
        rank_stabilized=lora.rank_stabilized,
    )
    made_of = {
        "operation": "from-peft",
        "version": __version__,
        "source": folder.fingerprint,
        "base": identity.base_fingerprint,
    }
    costs = {parameter.name: 2 * parameter.numel * 4 for parameter in contents.parameters}
    state = RunState(step=0, identity=None, hf_path=os.path.abspath(base), adapters=identity)
    sources = [folder.folder] if options.verify else []
    written = write_checkpoint(output, made_of, contents, folder.dtype, costs, options, state, folder.matrix, sources)
    return written, lora
