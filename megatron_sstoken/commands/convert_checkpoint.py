"""Convert checkpoints: Hugging Face folders to megatron's format and back; prove it; reshard and inspect.

Run the same command again to resume a conversion that was stopped. Needs no GPU.
"""

# ruff: noqa: E402 – what is imported later has to find torch and megatron as they are set up first.

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Large tensors in large pages, which the system gives in a third of the time; torch asks once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from megatron_sstoken.device import import_megatron

import_megatron()

from megatron_sstoken.config import ModelSettings, ParallelSettings
from megatron_sstoken.conversion.check import check_folders
from megatron_sstoken.conversion.dequantize import dequantize
from megatron_sstoken.conversion.gguf import from_gguf
from megatron_sstoken.conversion.hf import from_hf, reshard, to_hf
from megatron_sstoken.conversion.inspection import describe_checkpoint, format_description
from megatron_sstoken.conversion.peft import from_peft
from megatron_sstoken.conversion.text_part import put_text, take_text
from megatron_sstoken.conversion.verify import FACTOR, REAL_TEXT, verify
from megatron_sstoken.conversion.work import ConversionOptions, parse_bytes
from megatron_sstoken.folders import local_model
from megatron_sstoken.model.dtypes import DTYPES
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.parallel import processes_problem
from megatron_sstoken.tool import add_debug, run_tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    importing = commands.add_parser("from-hf", help="Hugging Face folder → megatron checkpoint, for any layout")
    importing.add_argument("--hf", type=local_model, required=True, help="Hugging Face folder")
    importing.set_defaults(run=_from_hf)
    _add_conversion_arguments(importing, dtypes="fp32 or bf16", shard_size="2GB")
    _add_vocabulary_argument(importing)

    unpacking = commands.add_parser("from-gguf", help="GGUF file → Hugging Face folder, by transformers")
    unpacking.add_argument("--gguf", required=True, metavar="FILE", help="GGUF file of a supported family")
    unpacking.add_argument("--output", required=True, help="folder to write")
    unpacking.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="type of the weights (default: fp32)")
    unpacking.add_argument("--overwrite", action="store_true", help="replace a folder that a conversion made")
    unpacking.set_defaults(run=_from_gguf)

    taking = commands.add_parser(
        "take-text", help="folder of a model that reads images, too → folder of its text model"
    )
    taking.set_defaults(run=_take_text)
    putting = commands.add_parser("put-text", help="the same folder with the tuned text model in place of its own")
    putting.add_argument("--text", type=local_model, required=True, help="folder of the tuned text model")
    putting.set_defaults(run=_put_text)
    for command in (taking, putting):
        command.add_argument("--hf", type=local_model, required=True, help="folder of the model that reads images, too")
        _add_writing_arguments(command, shard_size="5GB")

    dequantising = commands.add_parser("dequantize", help="folder in FP8 or MXFP4 → folder in BF16")
    dequantising.add_argument("--hf", type=local_model, required=True, help="Hugging Face folder of quantised weights")
    dequantising.set_defaults(run=_dequantize)
    _add_conversion_arguments(dequantising, dtypes="bf16 or fp32", shard_size="5GB", default="bf16")

    export = commands.add_parser("to-hf", help="megatron checkpoint → Hugging Face folder")
    _add_checkpoint_arguments(export)
    export.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model, adapters merged in")
    export.add_argument(
        "--chat_template",
        choices=("data", "own"),
        default="data",
        help="write the template that the data was prepared with, or keep the tokenizer's own (default: data)",
    )
    export.set_defaults(run=_to_hf)
    _add_conversion_arguments(export, dtypes="fp32, bf16 or fp16", shard_size="5GB")

    starting = commands.add_parser(
        "from-peft", help="PEFT folder → checkpoint of adapters, which a LoRA run starts from"
    )
    starting.add_argument("--adapter", type=local_model, required=True, help="PEFT folder with safetensors")
    starting.add_argument(
        "--hf", type=local_model, help="Hugging Face folder of the base (default: the one that the adapters name)"
    )
    starting.add_argument("--output", required=True, help="folder to write; it appears when it is complete")
    starting.add_argument("--overwrite", action="store_true", help="replace an output that a conversion made")
    starting.set_defaults(run=_from_peft)

    resharding = commands.add_parser("reshard", help="weights of a checkpoint → one with other padding or type")
    _add_checkpoint_arguments(resharding)
    resharding.set_defaults(run=_reshard)
    _add_conversion_arguments(resharding, dtypes="fp32 or bf16", shard_size="2GB")
    _add_vocabulary_argument(resharding)

    inspecting = commands.add_parser("inspect", help="print what a checkpoint holds")
    inspecting.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, or a directory of them (the newest)"
    )
    inspecting.add_argument("--json", action="store_true", help="print JSON")
    inspecting.set_defaults(run=_inspect)
    checking = commands.add_parser(
        "check",
        help="compare files with their checksums; exit code 1 where one is damaged",
        description="Compares every file that a checksums.json lists with it: checkpoints, conversions, prepared data and "
        "history stores, wherever they lie below a path.",
    )
    checking.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folders of any of these")
    checking.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
    checking.set_defaults(run=_check)
    _add_verify(commands)
    for command in commands.choices.values():
        add_debug(command)
    return parser.parse_args(arguments)


def _add_verify(commands) -> None:
    proof = commands.add_parser(
        "verify",
        help="compare tensors and logits with transformers; exit code 1 where they differ",
        description="Proves that a folder and megatron's model of it are the same: every tensor bit for bit, and the logits "
        "at every position. With several processes: torchrun --nproc-per-node N tools/convert_checkpoint.py verify …",
    )
    proof.add_argument("--hf", type=local_model, required=True, help="Hugging Face folder")
    proof.add_argument(
        "--checkpoint", help="megatron checkpoint that must hold the same weights (default: --hf converted)"
    )
    for name in ("tensor", "pipeline", "expert"):
        proof.add_argument(
            f"--{name}", type=int, default=1, help=f"{name} parallel size of the layout to prove (default: 1)"
        )
    proof.add_argument(
        "--factor",
        type=float,
        default=FACTOR,
        help=f"differences allowed, as a multiple of the noise of transformers' own fp32 (default: {FACTOR:g})",
    )
    proof.add_argument("--layers", action="store_true", help="print the relative difference of every layer")
    proof.add_argument(
        "--stream",
        action="store_true",
        help="read transformers' model layer by layer from the disk, if it does not fit into memory (needs accelerate)",
    )
    proof.add_argument(
        "--served",
        metavar="URL",
        help="compare with what is served there (vLLM, or what echoes its prompts with log probabilities as it does) instead "
        "of transformers: for models that transformers has no room for",
    )
    proof.add_argument("--served_model", help="its name there, if there are several")
    proof.add_argument(
        "--positions", type=int, help="tokens of each text (default: 256, or more than the sliding window)"
    )
    proof.add_argument("--text", type=Path, help="UTF-8 file with the real text (default: some lines of our own)")
    proof.set_defaults(run=_verify)


def _add_checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", required=True, help="checkpoint folder, or a directory of them (the newest)")
    command.add_argument(
        "--hf", type=local_model, help="folder to take config and tokenizer from (default: where training started)"
    )


def _add_vocabulary_argument(command: argparse.ArgumentParser) -> None:
    default = ModelSettings.vocabulary_multiple
    help_text = f"pad the vocabulary to a multiple of this, as model.vocabulary_multiple does (default: {default})"
    command.add_argument("--vocabulary_multiple", type=int, default=default, help=help_text)


def _add_conversion_arguments(
    command: argparse.ArgumentParser, *, dtypes: str, shard_size: str, default: str = "the source's"
) -> None:
    command.add_argument("--dtype", help=f"type of the weights written: {dtypes} (default: {default})")
    _add_writing_arguments(command, shard_size=shard_size)


def _add_writing_arguments(command: argparse.ArgumentParser, *, shard_size: str) -> None:
    command.add_argument("--output", required=True, help="folder to write; it appears when it is complete")
    command.add_argument("--overwrite", action="store_true", help="replace an output that a conversion made")
    memory_help = "tensors in memory at any time, mapped pages included (default: 4GB)"
    command.add_argument("--max_memory", default="4GB", help=memory_help)
    command.add_argument("--shard_size", default=shard_size, help=f"largest file of weights (default: {shard_size})")
    command.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
    command.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare what is read with its checksums meanwhile, where it has them (default: yes)",
    )


def _writing_options(arguments: argparse.Namespace) -> ConversionOptions:
    return ConversionOptions(
        max_memory=parse_bytes(arguments.max_memory),
        shard_size=parse_bytes(arguments.shard_size),
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
    )


def _options(arguments: argparse.Namespace) -> ConversionOptions:
    return replace(_writing_options(arguments), dtype=arguments.dtype)


def _from_hf(arguments: argparse.Namespace) -> int:
    multiple = arguments.vocabulary_multiple
    written = from_hf(arguments.hf, arguments.output, options=_options(arguments), vocabulary_multiple=multiple)
    print(f"written: {written}")
    if note := HuggingFaceWeights(arguments.hf).note():
        print(f"note: {note}")
    return 0


def _from_gguf(arguments: argparse.Namespace) -> int:
    written = from_gguf(arguments.gguf, arguments.output, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"written: {written}")
    return 0


def _take_text(arguments: argparse.Namespace) -> int:
    written = take_text(arguments.hf, arguments.output, options=_writing_options(arguments), tell=print)
    print(f"written: {written}")
    return 0


def _put_text(arguments: argparse.Namespace) -> int:
    options = _writing_options(arguments)
    written = put_text(arguments.hf, arguments.text, arguments.output, options=options, tell=print)
    print(f"written: {written}")
    return 0


def _dequantize(arguments: argparse.Namespace) -> int:
    written = dequantize(arguments.hf, arguments.output, options=_options(arguments), tell=print)
    print(f"written: {written}")
    return 0


def _from_peft(arguments: argparse.Namespace) -> int:
    options = ConversionOptions(overwrite=arguments.overwrite)
    written, lora = from_peft(arguments.adapter, arguments.output, hf_path=arguments.hf, options=options)
    print(
        f"written: {written}; train with --model.checkpoint={written} --lora.rank={lora.rank} --lora.alpha={lora.alpha:g} "
        f"--lora.rank_stabilized={str(lora.rank_stabilized).lower()} --lora.dropout={lora.dropout:g} "
        f"'--lora.targets=[{', '.join(lora.targets)}]'"
        + " --lora.dora=true" * lora.dora
        + (f" '--lora.train_whole=[{', '.join(lora.train_whole)}]'" if lora.train_whole else "")
    )
    return 0


def _to_hf(arguments: argparse.Namespace) -> int:
    written = to_hf(
        arguments.checkpoint,
        arguments.output,
        hf_path=arguments.hf,
        options=_options(arguments),
        merge=arguments.merge,
        chat_template=arguments.chat_template,
        tell=print,
    )
    print(f"written: {written}")
    return 0


def _reshard(arguments: argparse.Namespace) -> int:
    written = reshard(
        arguments.checkpoint,
        arguments.output,
        vocabulary_multiple=arguments.vocabulary_multiple,
        hf_path=arguments.hf,
        options=_options(arguments),
    )
    print(f"written: {written}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    description = describe_checkpoint(arguments.checkpoint)
    print(json.dumps(description, indent=1) if arguments.json else format_description(description))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Exit code 0 if every file is as it was written, else 1."""
    result = check_folders(arguments.paths, arguments.workers)
    print("\n".join([*result.problems, result.describe()]))
    return 1 if result.problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    """Exit code 0 if nothing differs, else 1; rank 0 prints the findings."""
    parallel = ParallelSettings(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if problems := parallel.problems():
        raise ValueError("; ".join(problem.replace("parallel.", "--") for problem in problems))
    if world_size % (parallel.tensor * parallel.pipeline):
        raise ValueError(processes_problem(parallel, world_size))
    result = verify(
        arguments.hf,
        checkpoint=arguments.checkpoint,
        parallel=parallel,
        factor=arguments.factor,
        positions=arguments.positions,
        text=arguments.text.read_text(encoding="utf-8") if arguments.text else REAL_TEXT,
        stream=arguments.stream,
        served=arguments.served,
        served_model=arguments.served_model,
    )
    if rank == 0:
        if arguments.layers:
            print("\n".join(comparison.table() for comparison in result.comparisons))
        print(result.describe())
        print("verified" if result.passed else "NOT THE SAME: see above", flush=True)
    return 0 if result.passed else 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run_tool(
        lambda: run(options), debug=options.debug, interrupted="interrupted: start the same command again to go on"
    )


if __name__ == "__main__":
    sys.exit(main())
