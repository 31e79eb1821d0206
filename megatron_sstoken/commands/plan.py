"""What a layout needs and gives: memory by pipeline stage, communication by kind, expected step time. No GPU needed.

    python tools/plan.py --model Llama-3.1-70B --gpu h100 --world_size 128 --tensor 8 --pipeline 4 --sequence
    python tools/plan.py --model Llama-3.1-70B --gpu h100 --world_size 64 --global_batch_size 64 --propose
    python tools/plan.py --config pretrain_scripts/configs/Llama-3.1-8B.yaml --parallel.tensor=4
    python tools/plan.py --config pretrain_scripts/configs/Llama-3.1-8B.yaml --world_size 16 --yaml > 16_gpus.yaml

With --config the settings are those of a run, from its YAML and as --section.key=value.

Exit code 0: fits; 1: does not fit, says by how much; 2: cannot run, says why. Times are estimates: docs/planning.md.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import Settings
from megatron_sstoken.folders import local_model
from megatron_sstoken.gpus import GPU, GPUS
from megatron_sstoken.model.presets import MODELS
from megatron_sstoken.planner.configuration import (
    Configured,
    as_settings,
    dense_architecture,
    problems_of_configuration,
    read_configuration,
    to_yaml,
    with_layout,
)
from megatron_sstoken.planner.describe import (
    describe_assumptions,
    describe_estimate,
    describe_gain,
    describe_proposals,
    verdict,
)
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.search import Estimate, estimate, precision_problems, propose, smallest_excess
from megatron_sstoken.planner.workload import Workload, problems_of_any_layout, problems_of_workload

NUMBERS = (
    "world_size tensor pipeline virtual_pipeline first_stage_layers last_stage_layers context micro_batch_size "
    "global_batch_size sequence_length offload_layers lora_rank vocabulary_multiple".split()
)
SHARES = ("response", "rho", "offload_fraction")
CHOICES = {
    name: get_args(get_type_hints(Workload)[name])
    for name in (
        "precision fp8_recipe recompute gradient_dtype first_moment_dtype second_moment_dtype backend head scope".split()
    )
}
SMALLER: tuple[dict[str, Any], ...] = (
    {"gradient_dtype": "bf16"},
    {"gradient_dtype": "bf16", "first_moment_dtype": "bf16", "second_moment_dtype": "bf16"},
    {"offload_fraction": 1.0, "first_moment_dtype": "fp32", "second_moment_dtype": "fp32"},
)
"""What takes less memory at the price of rounding, or of time; tried in this order where nothing fits."""
OF_BOTH = ("world_size", "response")
"""Options of a workload that a configuration leaves open."""


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, with those options of a workload that are given, and settings to read beside `--config`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=local_model, help=f"Hugging Face folder, or one of {', '.join(MODELS)}")
    what.add_argument("--config", help="YAML file with the settings of a run")
    parser.add_argument("--gpu", choices=GPUS, help="GPU type (default: h100, or hardware.gpu of the configuration)")
    defaults = {field.name: field.default for field in fields(Workload)}

    def add(name: str, *old: str, **keywords) -> None:
        text = "default: hardware.gpus of the configuration, or 1" if name == "world_size" else None
        parser.add_argument(
            f"--{name}", *old, default=argparse.SUPPRESS, help=text or f"default: {defaults[name]}", **keywords
        )

    for name in NUMBERS:
        add(name, type=int)
    for name, choices in CHOICES.items():
        add(name, *(("--implementation",) if name == "backend" else ()), choices=choices)  # its name one version ago
    for name in SHARES:
        add(name, type=float)
    parser.add_argument("--sequence", action="store_true", default=argparse.SUPPRESS, help="sequence parallel")
    parser.add_argument("--plain", action="store_true", help="plain fine-tuning: nothing is selected")
    parser.add_argument("--assume", nargs="*", default=[], metavar="NAME=VALUE", help="other assumptions: " + ", ".join(
        f"{field.name} ({field.default:.3g})" for field in fields(Assumptions)))  # fmt: skip
    parser.add_argument("--propose", action="store_true", help="list the fastest layouts of world_size GPUs that fit")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, counts")
    parser.add_argument(
        "--yaml", action="store_true", help="print the fastest layout as a configuration that a run reads"
    )
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.config is None or not all(one.startswith("--") and "." in one.split("=")[0] for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.config is not None:
        for name in [*NUMBERS, *CHOICES, *SHARES, "sequence"]:
            if name not in OF_BOTH and name in options:
                parser.error(f"--{name} cannot go with --config: change the setting, as --section.{name}=VALUE")
        if options.plain:
            parser.error("--plain cannot go with --config: use --selection.method=full")
    return options, rest


def read(options: argparse.Namespace, rest: list[str]) -> Configured:
    """The settings and the workload of the command line. Raises ValueError for a model that cannot be read."""
    if options.config is not None:
        settings, _ = parse_settings(["--config", options.config, *rest], program="tools/plan.py", description="")
        given = {name: getattr(options, name) for name in OF_BOTH if name in options}
        return read_configuration(settings, **given)
    given = {name: getattr(options, name) for name in [*NUMBERS, *CHOICES, *SHARES, "sequence"] if name in options}
    w = Workload(dense_architecture(options.model), selects=not options.plain, **given)
    return Configured(as_settings(w, options.model), w, [])


def read_assumptions(changes: list[str]) -> Assumptions:
    """Defaults with NAME=VALUE changes. Raises ValueError for others."""
    known = [field.name for field in fields(Assumptions)]
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in known:
            raise ValueError(f"--assume {change}: there is no assumption {name!r}: use one of {', '.join(known)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"--assume {change}: {value!r} is not a number: use one above 0") from None
        positive = ("matmul", "matmul_fp8", "attention", "memory", "links", "host")
        if values[name] < 0 or (values[name] == 0 and name in positive):
            raise ValueError(f"--assume {change}: use a number above 0")
    return replace(Assumptions(), **values)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options, rest = parse_arguments(arguments)
    try:
        configured, assumptions = read(options, rest), read_assumptions(options.assume)
    except (ValueError, OSError) as error:
        return _refuse([str(error)])
    workload, name = configured.workload, options.gpu or configured.settings.hardware.gpu
    gpu = GPUS[name]
    problems = precision_problems(workload, gpu)
    if options.propose or options.yaml:
        problems += problems_of_any_layout(workload)
    elif options.config is not None:
        problems += problems_of_configuration(configured)
    else:
        problems += problems_of_workload(workload)
    if problems:
        return _refuse(problems)
    for note in configured.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.propose or options.yaml:
        proposals = propose(workload, gpu, assumptions)
        if not proposals:
            return _nothing_fits(workload, gpu, assumptions)
        if options.yaml:
            print(_as_yaml(configured.settings, proposals[0], name), end="")
        elif options.json:
            print(json.dumps([proposal.as_dict() for proposal in proposals], indent=2))
        else:
            print(f"{describe_proposals(proposals)}\n\n{describe_assumptions(proposals[0])}")
        return 0
    found = estimate(workload, gpu, assumptions)
    print(json.dumps(found.as_dict(), indent=2) if options.json else describe_estimate(found))
    if options.config is not None and not options.json:
        print(describe_gain(found, next(iter(propose(workload, gpu, assumptions, 1)), None)))
    if found.excess > 0 and options.json:
        print(verdict(found), file=sys.stderr)
    return 1 if found.excess > 0 else 0


def _as_yaml(settings: Settings, proposal: Estimate, gpu: str) -> str:
    w = proposal.workload
    return (
        f"# {w.world_size} × {proposal.gpu.name}: {proposal.speed.tokens_per_gpu:,.0f} tokens/s/GPU expected\n"
        f"# (tools/plan.py; an estimate). {verdict(proposal)}.\n{to_yaml(with_layout(settings, w, gpu))}"
    )


def _nothing_fits(workload: Workload, gpu: GPU, assumptions: Assumptions) -> int:
    nearest = smallest_excess(workload, gpu, assumptions)
    if nearest is None:
        return _refuse(
            [
                f"no layout of {workload.world_size} GPUs divides the model and global_batch_size="
                f"{workload.global_batch_size}: use another number of GPUs, or a multiple of it as batch"
            ]
        )
    print(f"no layout of {workload.world_size} GPUs fits; the nearest {verdict(nearest)}", file=sys.stderr)
    for changes in SMALLER if workload.precision != "fp32" else ():
        if propose(replace(workload, **changes), gpu, assumptions, 1):
            print(
                "there are layouts that fit with " + ", ".join(f"{k}={v}" for k, v in changes.items()), file=sys.stderr
            )
            break
    return 1


def _refuse(problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
