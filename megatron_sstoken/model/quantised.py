"""What a config.json says of quantised weights, and what messages advise: such weights are read by `dequantize` alone."""

import os
from typing import Any

DEQUANTISED = ("fp8", "mxfp4")
"""Values of `quant_method` that `convert_checkpoint.py dequantize` reads."""
FIELD = "quantization_config"


def quantisation_of(config: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a config.json, or of the `text_config` in it, as transformers looks for it; {}: it has none."""
    text = config.get("text_config")
    found = config.get(FIELD) or (text.get(FIELD) if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else {}


def quantised_remedy(folder: str, config: dict[str, Any]) -> str:
    """What to do with a folder of quantised weights, in words."""
    if quantisation_of(config).get("quant_method") in DEQUANTISED:
        return (
            f"make a folder of BF16 weights with `python tools/convert_checkpoint.py dequantize --hf {folder or os.curdir} "
            "--output FOLDER`, and use that"
        )
    methods = " and ".join(DEQUANTISED)
    return f"name the folder of the BF16 weights (convert_checkpoint.py dequantize makes one of {methods} alone)"
