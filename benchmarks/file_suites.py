"""The suites of `tools/benchmark.py` that measure files in and files out: data preparation and checkpoint conversion."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer

from benchmarks.measure import Rows, alternate
from benchmarks.workload import RECIPE, Options
from megatron_sstoken.conversion.hf import from_hf, to_hf
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.tokenizer import TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.files import sync
from megatron_sstoken.parallel import reset_layout

WORKERS = 2
_tokenizer: TextTokenizer
_backend: tokenizers.Tokenizer
"""Of a worker process; `_load` sets both."""


def preparation(options: Options) -> None:
    """Preparing GSM8K against plain loops over `tokenizers` with as many workers, which keep nothing but a count."""
    assert options.tensor == 1, "one process"
    source, model = options.gsm8k / "train.jsonl", options.work / "model"
    variants: dict[str, Callable[[], object]] = {
        "plain loop, chat template": partial(plain_loop, source, model, _rendered),
        "plain loop, f-string": partial(plain_loop, source, model, _formatted),
        "tools/prepare_data.py": lambda: prepare(
            [source], model, options.work / "prepared", recipe=RECIPE, workers=WORKERS, overwrite=True, progress=False
        ),
    }
    rows = Rows("prepare", options.config(workers=WORKERS))
    for name, timing in alternate(variants, options.rounds).items():
        rows.add("GSM8K train", name, timing)
    rows.append()


def plain_loop(source: Path, model: Path, text_of: Callable[[dict], str]) -> int:
    """Number of tokens: make a text of every line and encode it; roles, checks and files left out."""
    with open(source, "rb") as file:
        lines = file.readlines()
    parts = [lines[first : first + 512] for first in range(0, len(lines), 512)]
    with ProcessPoolExecutor(WORKERS, get_context("forkserver"), initializer=_load, initargs=(str(model),)) as pool:
        return sum(pool.map(partial(_encode, text_of), parts))


def _load(model: str) -> None:
    global _tokenizer, _backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer, _backend = load_tokenizer(model), AutoTokenizer.from_pretrained(model).backend_tokenizer


def _encode(text_of: Callable[[dict], str], lines: list[bytes]) -> int:
    texts = [text_of(json.loads(line)) for line in lines]
    return sum(len(encoding.ids) for encoding in _backend.encode_batch_fast(texts, add_special_tokens=False))


def _rendered(row: dict) -> str:
    """Through the tokenizer's own template, as `apply_chat_template` does."""
    question, answer = row["question"], row["answer"]
    return _tokenizer.render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]).text


def _formatted(row: dict) -> str:
    """The same text, by who knows the template by heart."""
    turns = (("user", row["question"]), ("assistant", row["answer"]))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def conversion(options: Options) -> None:
    """Converting the workload's model both ways against copying its files, each until the bytes are on disk."""
    assert options.tensor == 1, "one process"
    reset_layout()  # a suite before this one has left its process groups; conversion makes its own
    model, megatron = options.work / "model", options.work / "megatron"
    how = ConversionOptions(workers=WORKERS, overwrite=True)
    from_hf(str(model), str(megatron), options=how)
    num_bytes = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    copied, target = options.work / "copied", options.work / "converted"

    def copy() -> None:
        shutil.copytree(model, copied, dirs_exist_ok=True)
        for path in copied.iterdir():
            sync(path)  # as conversion does with all that it writes

    variants = {
        "copy": copy,
        "from-hf": lambda: from_hf(str(model), str(target), options=how),
        "to-hf": lambda: to_hf(str(megatron), str(target), options=how),
    }
    rows = Rows("convert", options.config(workers=WORKERS, bytes=num_bytes))
    for name, timing in alternate(variants, options.rounds).items():
        speed = round(num_bytes / 1e9 / timing.columns()["seconds"], 3)
        rows.add("random Llama, fp32", name, timing, gigabytes_per_second=speed)
    rows.append()
    for folder in (copied, target, megatron):
        shutil.rmtree(folder)
