"""A GGUF file → a Hugging Face folder, by transformers, which reads such files of most families."""

import importlib.util
import os
from pathlib import Path

from megatron_sstoken.conversion.work import Workplace, refuse_existing
from megatron_sstoken.model.dtypes import DTYPES
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files


def from_gguf(file: str, output: str, *, dtype: str = "fp32", overwrite: bool = False) -> Path:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder; the whole model is in memory meanwhile.

    The weights are those of the quantised file, as numbers of the type `dtype`. The output appears complete or not at all.
    Raises ValueError for a file that cannot be read, a model of a family that is not supported, a missing `gguf` package, and
    an output in the way.
    """
    if not os.path.isfile(file):
        raise ValueError(f"--gguf={file} is not a file: name one that ends in .gguf")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--gguf={file} cannot be read: the package gguf is not installed: pip install gguf")
    refuse_existing(output, overwrite, [file])
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {
        "pretrained_model_name_or_path": os.path.dirname(os.path.abspath(file)),
        "gguf_file": os.path.basename(file),
    }
    identity = {"operation": "from-gguf", "dtype": dtype, "source": fingerprint_files([file])}
    with Workplace(output, identity) as place:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=DTYPES[dtype], trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        except Exception as error:  # transformers raises anything for files that it cannot read
            first = str(error).partition("\n")[0]
            raise ValueError(
                f"--gguf={file} cannot be read by transformers ({first}): use another form of the model"
            ) from error
        model.save_pretrained(place.folder)
        tokenizer.save_pretrained(place.folder)
        read_architecture(str(place.folder))
        return place.publish()
