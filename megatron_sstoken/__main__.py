"""All programs by name: `python -m megatron_sstoken NAME …`, or `megatron-sstoken NAME …` where it is installed."""

import importlib
import importlib.util
import platform
import sys
from importlib import metadata

from megatron_sstoken import __version__
from megatron_sstoken.tool import say_interrupted
from megatron_sstoken.words import did_you_mean

PACKAGE = "megatron_sstoken"
COMMANDS = {
    "prepare_data": ("commands.prepare_data", "conversations → tokens and roles, in a folder that training reads"),
    "train": (
        "train",
        "fine-tune on selected tokens; --dry_run prints the plan, --print_schema the settings for editors",
    ),
    "score": ("score", "scores and selection of every token of a data set, without training"),
    "report": ("report.program", "a page that shows which tokens were selected, and whether it helps"),
    "convert_checkpoint": (
        "commands.convert_checkpoint",
        "Hugging Face ↔ megatron: convert, export, verify, inspect, check",
    ),
    "chat": ("chat", "talk to an exported model"),
    "evaluate": ("evaluate", "exact match of an exported model's answers"),
    "launch": (
        "launch",
        "start a program on all GPUs of a machine, or of several: torchrun, with endings people can read",
    ),
    "plan": ("commands.plan", "memory and time of a layout before there is a GPU; --propose finds the fastest"),
    "make_config": ("commands.make_config", "config.json of a published model, to plan with"),
    "doctor": ("doctor", "what this machine has, and what the layers will be made of"),
    "preflight": ("preflight.__main__", "whether the machines of a job can start it: GPUs, links, shared folder"),
}
"""Name → module of the package whose `main(arguments)` it is, and what it does; those that are installed."""
OF_A_CHECKOUT = {
    "pretrain_scripts/setup.sh": "makes the environment",
    "pretrain_scripts/quickstart.sh": "all of it on a toy, from nothing",
    "pretrain_scripts/single_gpu.sh, node.sh, nodes.sh, slurm.sh": "train on GPUs by a file of pretrain_scripts/configs",
    "tools/make_toy.py": "the toy: data, tokenizer and model",
    "tools/benchmark.py": "measures what docs/performance.md says",
}


def commands() -> dict[str, tuple[str, str]]:
    """Those of `COMMANDS` that are there: name → full name of the module, and what it does."""
    named = {name: (f"{PACKAGE}.{module}", about) for name, (module, about) in COMMANDS.items()}
    return {name: one for name, one in named.items() if _exists(one[0])}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code of the program that is named."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("--version", "-V", "version"):
        print(versions())
        return 0
    found = commands()
    if name not in found:
        near = did_you_mean(name, found)
        print(f"error: {name} is not a command: {near}use one of {', '.join(found)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(found[name][0]).main(rest)
    except KeyboardInterrupt:
        return say_interrupted()


def overview() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"{__doc__}".strip(), "", *(f"  {name:<{width}}{about}" for name, (_, about) in commands().items())]
    lines += [
        "",
        "`NAME --help` tells the options of each; --version the versions. In a checkout there are, besides:",
        "",
    ]
    return "\n".join([*lines, *(f"  {path}: {about}" for path, about in OF_A_CHECKOUT.items())])


def versions() -> str:
    """One line for reports of what went wrong."""
    parts = [f"megatron-sstoken {__version__}"]
    for package in ("megatron-core", "torch", "transformers"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a folder that is not there
        return False


if __name__ == "__main__":
    sys.exit(main())
