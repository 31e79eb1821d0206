"""The suites of `tools/benchmark.py` that measure files in and files out: data preparation and checkpoint conversion."""

import json
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from benchmarks.measure import Rows, alternate
from benchmarks.plain_loop import chatml, plain_loop
from benchmarks.workload import RECIPE, Options
from megatron_sstoken.conversion.hf import from_hf, to_hf
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.tokenizer import TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.files import sync
from megatron_sstoken.parallel import reset_layout

WORKERS = 2
BATCH = 512  # lines of a task of the plain loop


def preparation(options: Options) -> None:
    """Preparing GSM8K against plain loops over `tokenizers` with as many workers, which keep nothing but a count."""
    assert options.tensor == 1, "one process"
    source, model = options.gsm8k / "train.jsonl", options.work / "model"
    variants: dict[str, Callable[[], object]] = {
        "plain loop, chat template": partial(plain_loop, source, model, WORKERS, partial(_rendered, model), BATCH),
        "plain loop, f-string": partial(plain_loop, source, model, WORKERS, _formatted, BATCH),
        "tools/prepare_data.py": lambda: prepare(
            [source], model, options.work / "prepared", recipe=RECIPE, workers=WORKERS, overwrite=True, progress=False
        ),
    }
    rows = Rows("prepare", options.config(workers=WORKERS))
    for name, timing in alternate(variants, options.rounds).items():
        rows.add("GSM8K train", name, timing)
    rows.append()


def _rendered(model: Path, line: bytes) -> str:
    """Through the tokenizer's own template, as `apply_chat_template` does."""
    question, answer = _exchange(line)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _tokenizer(model).render(messages).text


def _formatted(line: bytes) -> str:
    """The same text."""
    question, answer = _exchange(line)
    return chatml(("user", question), ("assistant", answer))


def _exchange(line: bytes) -> tuple[str, str]:
    row = json.loads(line)
    return row["question"], row["answer"]


@lru_cache(maxsize=1)
def _tokenizer(model: Path) -> TextTokenizer:
    """Of a worker process."""
    return load_tokenizer(model)


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
