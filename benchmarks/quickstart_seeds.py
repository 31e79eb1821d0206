#!/usr/bin/env python3
"""Does selection help on the quickstart's toy? Validation losses of full, random and ssToken over seeds, with their spread.

    python benchmarks/quickstart_seeds.py --work WORK [--seeds 0 1 2] [--rho 0.6 0.9] [--start random] [--section.key=value …]

Each seed makes its own toy (conversations and weights) and orders the data; every method starts from the same weights and
takes the same steps, on one process. The settings are the quickstart's, unless others are given. What is there is not trained
again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.intervals import Interval  # noqa: E402
from pretrain_scripts.quickstart_report import read_scalars  # noqa: E402

CONFIG = ROOT / "pretrain_scripts" / "configs" / "quickstart.yaml"


def run(*command: str) -> str:
    """Run a program of the project with this interpreter; what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SSTOKEN_DEVICE": "cpu"}
    found = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}\n{found.stdout}\n{found.stderr}")
    return found.stdout


def make_seed(folder: Path, seed: int, start: str) -> None:
    """Toy and prepared data of a seed."""
    if (folder / "validation" / "manifest.json").is_file():
        return
    run("tools/make_toy.py", "--output", f"{folder}/toy", "--seed", str(seed), "--start", start)
    for name, rows in (("train", "chat"), ("validation", "validation")):
        run(
            "tools/prepare_data.py", "--input", f"{folder}/toy/{rows}.jsonl", "--tokenizer", f"{folder}/toy/model",
            "--output", f"{folder}/{name}", "--overwrite",
        )  # fmt: skip


def validation_loss(folder: Path, name: str, seed: int, settings: list[str]) -> dict[str, float]:
    """Train in `folder`/`name` if need be; the last validation loss, and how far dropped tokens are above their history."""
    result = folder / name / "result.json"
    if not result.is_file():
        printed = run(
            "-m", "megatron_sstoken.train", "--config", str(CONFIG), f"--model.hf_path={folder}/toy/model",
            f"--data.train={folder}/train", f"--data.validation={folder}/validation", f"--training.seed={1234 + seed}",
            f"--checkpoint.directory={folder}/{name}", "--checkpoint.save_every=0", "--logging.records_every=0",
            "--logging.every=1", *settings,
        )  # fmt: skip
        scalars = read_scalars(folder / name / "logs")
        drift = scalars.get("loss/dropped_minus_history")
        found = {"validation": scalars["loss/validation"][-1].value, "warned": float("warning: step" in printed)}
        result.write_text(json.dumps(found | ({"drift": drift[-1].value} if drift else {})))
    return json.loads(result.read_text())


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to make")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rho", nargs="+", default=["0.9", "0.6"])
    parser.add_argument("--start", choices=("pretrained", "random"), default="pretrained")
    parser.add_argument(
        "--name", default="default", help="folder of the runs within a seed; one for each choice of settings"
    )
    options, settings = parser.parse_known_args()
    runs = {"full": ["--selection.method=full"]}
    for rho in options.rho:
        for method in ("random", "sstoken"):
            runs[f"{method} {rho}"] = [f"--selection.method={method}", f"--selection.rho={rho}"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in options.seeds:
        folder = options.work / f"{options.start}-{seed}"
        make_seed(folder, seed, options.start)
        for name, changes in runs.items():
            place = f"{options.name}-{name.replace(' ', '-')}"
            found[name].append(validation_loss(folder, place, seed, [*changes, *settings]))
            print(f"seed {seed}  {name:<12} {found[name][-1]}", flush=True)
    print(
        f"\n| validation loss, {len(options.seeds)} seeds, start {options.start} | mean ± 95 % | each |\n|---|---|---|"
    )
    for name, results in found.items():
        losses = [one["validation"] for one in results]
        print(f"| {name} | {Interval.of(losses)} | {', '.join(f'{loss:.4f}' for loss in losses)} |")
    for rho in options.rho:
        pairs = zip(found[f"sstoken {rho}"], found[f"random {rho}"], strict=True)
        differences = [ours["validation"] - theirs["validation"] for ours, theirs in pairs]
        print(
            f"| sstoken − random, {rho} | {Interval.of(differences)} | {', '.join(f'{d:+.4f}' for d in differences)} |"
        )


if __name__ == "__main__":
    main()
