#!/usr/bin/env python3
"""An epoch of ssToken on GSM8K with tensor parallel 2, from the raw problems to an exported model, checked.

    python benchmarks/gsm8k_epoch.py --gsm8k FOLDER_WITH_train.jsonl --work WORK [--setting --section.key=value …]

A tokenizer is trained on the problems, a Llama of 4.5 million parameters starts at random, everything else is done by
the project's own programs. In the end the exported model's logits are compared with megatron's at every position of
some problems, under tensor parallel 2.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_sstoken.data.store import SampleStore  # noqa: E402
from tools.make_toy import make_model, make_tokenizer  # noqa: E402

NUM_COMPARED = 8


def make_start(problems: Path, folder: Path) -> None:
    """Tokenizer and random Llama for the problems, as a Hugging Face folder."""
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    conversations = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    tokenizer = make_tokenizer(conversations, vocabulary=4096)
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, hidden=256, layers=3, seed=0).save_pretrained(folder)


def run(*command: str) -> float:
    """Run a program of the project with this interpreter; seconds it took."""
    begun = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    return time.monotonic() - begun


def torchrun(*arguments: str) -> tuple[str, ...]:
    """The launcher for two processes."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments)


def compare_logits(checkpoint: str, exported: str, data: str) -> None:
    """On both processes: logits of megatron under tensor parallel 2 against transformers, at every position."""
    from megatron_sstoken.checkpoint.manifest import open_checkpoint
    from megatron_sstoken.checkpoint.save_load import load_checkpoint
    from megatron_sstoken.config import Settings
    from megatron_sstoken.model.attention import sample_bounds
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout, start_processes, stop_processes

    start_processes()
    settings = Settings()
    settings.parallel.tensor, settings.training.precision = 2, "fp32"
    layout = create_layout(settings.parallel, seed=0)
    model = build_model(read_architecture(exported), settings, layout, trainable=False)
    load_checkpoint(open_checkpoint(checkpoint), model)
    reference = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    store = SampleStore(data)
    largest, positions = 0.0, 0
    for index in range(NUM_COMPARED):
        tokens = torch.from_numpy(store.tokens(index)).long().unsqueeze(0)
        length = tokens.shape[1]
        with torch.no_grad():
            bounds = sample_bounds([length])
            mine = model.unwrapped[0](tokens, torch.arange(length).unsqueeze(0), None, packed_seq_params=bounds)[0]
            parts = [torch.empty_like(mine) for _ in range(2)]
            torch.distributed.all_gather(parts, mine.contiguous(), group=layout.groups.tp)
            wanted = reference(tokens).logits[0]
        found = torch.cat(parts, dim=-1)[:, : wanted.shape[1]]
        largest = max(largest, float((found - wanted).abs().max()))
        positions += length
    if layout.rank == 0:
        print(f"logits: largest difference {largest:.2e} over {positions} positions of {NUM_COMPARED} problems")
    stop_processes()
    if largest > 1e-4:
        sys.exit(f"logits differ by {largest:.2e}, more than 1e-4")


def main() -> None:
    """Do everything and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder to make")
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()
    work = options.work
    if options.compare:
        compare_logits(f"{work}/run", f"{work}/exported", f"{work}/test")
        return
    make_start(options.gsm8k / "train.jsonl", work / "start")
    seconds = {}
    for part in ("train", "test"):
        seconds[f"prepare {part}"] = run(
            "tools/prepare_data.py", "--input", f"{options.gsm8k}/{part}.jsonl", "--tokenizer", f"{work}/start",
            "--output", f"{work}/{part}", "--fields", "prompt=question,response=answer",
        )  # fmt: skip
    seconds["train (history included)"] = run(
        *torchrun("-m", "megatron_sstoken.train"), f"--model.hf_path={work}/start", f"--data.train={work}/train",
        f"--data.validation={work}/test", "--data.sequence_length=512", "--parallel.tensor=2",
        "--training.precision=fp32", "--training.epochs=1", "--training.global_batch_size=16",
        "--training.micro_batch_size=2", "--optimizer.learning_rate=1e-3", "--optimizer.schedule=cosine",
        "--logging.every=10", f"--checkpoint.directory={work}/run", *settings,
    )  # fmt: skip
    seconds["export"] = run(
        "tools/convert_checkpoint.py", "to-hf", "--checkpoint", f"{work}/run", "--output", f"{work}/exported"
    )
    run(*torchrun(__file__, "--work", str(work), "--compare"))
    for name, value in seconds.items():
        print(f"{name:<28} {value:7.1f} s")


if __name__ == "__main__":
    main()
