#!/usr/bin/env python3
"""What a layout needs and gives: memory by pipeline stage, communication by kind, expected step time. No GPU needed.

    python tools/plan.py --model Llama-3.1-70B --gpu h100 --world_size 128 --tensor 8 --pipeline 4 --sequence
    python tools/plan.py --model Llama-3.1-70B --gpu h100 --world_size 64 --global_batch_size 64 --propose

Exit code 0: fits; 1: does not fit, says by how much; 2: cannot run, says why. Times are estimates: docs/planning.md.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

try:
    import megatron_sstoken  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sstoken.model.presets import MODELS, find_architecture
from megatron_sstoken.planner.describe import describe_assumptions, describe_estimate, describe_proposals, verdict
from megatron_sstoken.planner.hardware import GPU, GPUS, Assumptions
from megatron_sstoken.planner.search import estimate, precision_problems, propose, smallest_excess
from megatron_sstoken.planner.workload import Workload, problems_of_any_layout, problems_of_workload

NUMBERS = (
    "world_size tensor pipeline virtual_pipeline context micro_batch_size global_batch_size sequence_length lora_rank "
    "vocabulary_multiple".split()
)
CHOICES = {
    name: get_args(get_type_hints(Workload)[name])
    for name in ("precision", "fp8_recipe", "recompute", "backend", "head", "scope")
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are those of `Workload` and `Assumptions`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"Hugging Face folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="GPU type (default: h100)")
    defaults = {field.name: field.default for field in fields(Workload)}
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=f"default: {defaults[name]}")
    for name, choices in CHOICES.items():
        old = ("--implementation",) if name == "backend" else ()  # its name one version ago
        parser.add_argument(
            f"--{name}", *old, choices=choices, default=defaults[name], help=f"default: {defaults[name]}"
        )
    for name in ("response", "rho"):
        parser.add_argument(f"--{name}", type=float, default=defaults[name], help=f"default: {defaults[name]}")
    parser.add_argument("--sequence", action="store_true", help="sequence parallel")
    parser.add_argument("--plain", action="store_true", help="plain fine-tuning: nothing is selected")
    parser.add_argument("--assume", nargs="*", default=[], metavar="NAME=VALUE", help="other assumptions: " + ", ".join(
        f"{field.name} ({field.default:.3g})" for field in fields(Assumptions)))  # fmt: skip
    parser.add_argument("--propose", action="store_true", help="list the fastest layouts of world_size GPUs that fit")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, counts")
    return parser.parse_args(arguments)


def read_workload(options: argparse.Namespace) -> Workload:
    """The workload of the command line. Raises ValueError for a model that cannot be read."""
    values = {name: getattr(options, name) for name in (*NUMBERS, *CHOICES, "response", "rho", "sequence")}
    architecture = find_architecture(options.model)
    if architecture.num_experts:
        raise ValueError(
            f"the model {options.model!r} is a mixture of experts, for which there is no estimate: name a dense model"
        )
    return Workload(architecture, selects=not options.plain, **values)


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
        if values[name] < 0 or (values[name] == 0 and name in ("matmul", "matmul_fp8", "attention", "memory", "links")):
            raise ValueError(f"--assume {change}: use a number above 0")
    return replace(Assumptions(), **values)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    gpu = GPUS[options.gpu]
    try:
        workload, assumptions = read_workload(options), read_assumptions(options.assume)
    except (ValueError, OSError) as error:
        return _refuse([str(error)])
    problems = precision_problems(workload, gpu)
    problems += problems_of_any_layout(workload) if options.propose else problems_of_workload(workload)
    if problems:
        return _refuse(problems)
    if options.propose:
        return _propose(workload, gpu, assumptions, options.json)
    found = estimate(workload, gpu, assumptions)
    print(json.dumps(found.as_dict(), indent=2) if options.json else describe_estimate(found))
    if found.excess > 0 and options.json:
        print(verdict(found), file=sys.stderr)
    return 1 if found.excess > 0 else 0


def _propose(workload: Workload, gpu: GPU, assumptions: Assumptions, as_json: bool) -> int:
    proposals = propose(workload, gpu, assumptions)
    if not proposals:
        nearest = smallest_excess(workload, gpu, assumptions)
        if nearest is None:
            return _refuse(
                [
                    f"no layout of {workload.world_size} GPUs divides the model and global_batch_size="
                    f"{workload.global_batch_size}: use another number of GPUs, or a multiple of it as batch"
                ]
            )
        print(f"no layout of {workload.world_size} GPUs fits; the nearest {verdict(nearest)}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps([proposal.as_dict() for proposal in proposals], indent=2))
    else:
        print(f"{describe_proposals(proposals)}\n\n{describe_assumptions(proposals[0])}")
    return 0


def _refuse(problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
