"""A Hugging Face folder, or a PEFT folder and its base → a model in transformers that can be talked to."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_sstoken.folders import ADAPTER_CONFIG, holds_checkpoints, local_model

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""What the weights are computed in; auto: as they are stored."""


class ModelFolder:
    """Where a model's weights, its tokenizer and its adapters are.

    `model` may be a whole model, or the folder of adapters, which names its base itself. Raises ValueError, without importing
    torch, where there is no model.
    """

    def __init__(self, model: str | Path, adapter: str | Path | None = None):
        self.base, self.adapter = Path(model), Path(adapter) if adapter is not None else None
        if self.adapter is not None and not (self.adapter / ADAPTER_CONFIG).is_file():
            raise ValueError(f"--adapter {adapter} holds no {ADAPTER_CONFIG}: name a PEFT folder")
        if self.adapter is None and (self.base / ADAPTER_CONFIG).is_file():
            self.adapter, self.base = self.base, _base_of(self.base)
        _require_model(self.base)

    @property
    def name(self) -> Path:
        """The folder that the user means."""
        return self.adapter or self.base

    def state(self) -> list[tuple[str, int, int]]:
        """(file, bytes, time of change in ns) of all weights: equal for the same weights."""
        folders = [folder for folder in (self.base, self.adapter) if folder is not None]
        files = [file for folder in folders for file in sorted(folder.resolve().glob("*.safetensors"))]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def template(self) -> str | None:
        """The chat template that belongs to the adapters, where there is one; the base's tokenizer knows its own."""
        path = self.adapter / "chat_template.jinja" if self.adapter is not None else None
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def load_tokenizer(self) -> Any:
        """transformers' tokenizer with the chat template. Raises ValueError where there is none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.base)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.base} has no tokenizer that transformers can read ({first})") from error
        tokenizer.chat_template = self.template() or tokenizer.chat_template
        return tokenizer

    def load_model(self, *, device: str = "auto", dtype: str = "auto") -> Any:
        """transformers' model in evaluation mode, on `device`: auto is the GPUs, if there are any."""
        import torch
        from transformers import AutoModelForCausalLM

        device = _device(device)
        options: dict[str, Any] = {"dtype": _torch_dtype(dtype), "use_safetensors": True}
        if device == "cuda" and importlib.util.find_spec("accelerate"):
            options["device_map"] = "auto"  # over all GPUs, if it does not fit one
        try:
            model = AutoModelForCausalLM.from_pretrained(self.base, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.base} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        if self.adapter is not None:
            model = _with_adapters(model, self.adapter)
        if "device_map" not in options:
            try:
                model = model.to(device)
            except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
                raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
        torch.set_grad_enabled(False)
        return model.eval()


def _base_of(adapter: Path) -> Path:
    try:
        named = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} is not JSON ({error}): export the adapters again") from error
    base = local_model(named or "")
    if not os.path.isdir(base):
        raise ValueError(
            f"{adapter} holds adapters of {named}, which is no folder here: pass --model BASE --adapter {adapter}"
        )
    return Path(base)


def _require_model(folder: Path) -> None:
    if not folder.is_dir():
        remedy = "name the folder that to-hf wrote"
        if folder.is_file():
            remedy = "name the folder that the file is in"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            remedy += f", or, if it is on the Hub: hf download {folder} --local-dir {folder.name}"
        raise ValueError(f"--model {folder} is no folder: {remedy}")
    if (folder / "config.json").is_file():
        return
    if holds_checkpoints(folder):
        command = (
            f"python tools/convert_checkpoint.py to-hf --checkpoint {folder} --output {str(folder).rstrip('/')}-hf"
        )
        raise ValueError(f"--model {folder} holds megatron checkpoints: export them first: {command}")
    raise ValueError(f"--model {folder} holds no config.json: name the folder that to-hf wrote")


def _with_adapters(model: Any, adapter: Path) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{adapter} holds adapters, which need peft: pip install peft, or export with to-hf --merge")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the adapters of {adapter} do not fit {model.config.name_or_path}: {first}") from error


def _device(name: str) -> str:
    """The name of a device of torch. `SSTOKEN_DEVICE=cpu` hides the GPUs, as everywhere."""
    import torch

    if name != "auto":
        return name
    if os.environ.get("SSTOKEN_DEVICE") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _torch_dtype(name: str) -> Any:
    import torch

    return {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
