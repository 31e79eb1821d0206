"""The supported lines of megatron-core side by side; see CONTRIBUTING.md.

python -m tests.helpers.lines make                     # the checkpoint of this environment's line, for every line's tests
python -m tests.helpers.lines compare OTHER_PYTHON     # losses and gradients of both lines, every family
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_sstoken.config import Settings
from tests.helpers import cli, programs
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import run_cases
from tests.helpers.workbench import FAMILIES, make_model, make_samples, make_settings, make_store

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
SAVED, STEPS = 3, 6
TINY = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}


def line_folder() -> Path:
    """Where the checkpoint lies that the installed line makes."""
    return CHECKPOINTS / f"megatron-core-{metadata.version('megatron-core')}"


def run_settings(folder: Path, run: Path, **changes: Any) -> Settings:
    """The run that is saved after half of its steps; `folder` holds its model and its data."""
    values = {
        "training__global_batch_size": 4,
        "training__steps": STEPS,
        "optimizer__learning_rate": 1e-2,
        "checkpoint__directory": str(run),
        "checkpoint__save_every": SAVED,
        "checkpoint__keep": 0,
        "history__store": str(run.parent / "history"),
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def train(settings: Settings, num_ranks: int = 1) -> dict[int, float]:
    """Train as a user does; step → loss of the selected tokens."""
    arguments = cli.settings_arguments(settings)
    result = programs.run("megatron_sstoken.train", [*arguments], num_ranks)
    assert result.returncode == 0, result.stderr
    return cli.scalars(Path(settings.checkpoint.directory) / "logs", "loss/selected")


def export(folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """The weights that `to-hf` makes of a line's checkpoint."""
    options = ["--checkpoint", str(folder / "run"), "--hf", str(folder / "model"), "--output", str(output)]
    result = cli.run([sys.executable, str(cli.ROOT / "tools" / "convert_checkpoint.py"), "to-hf", *options])
    assert result.returncode == 0, result.stderr
    return load_file(output / "model.safetensors")


def make(folder: Path) -> None:
    """Train, and keep of the run: model, data, the checkpoint in its middle, what it exports, and the losses."""
    shutil.rmtree(folder, ignore_errors=True)
    make_model(folder / "model", "qwen3", seed=1, tie_word_embeddings=True, head_dim=4, **TINY)
    make_store(folder / "data", make_samples(12, seed=2))
    with tempfile.TemporaryDirectory() as work:
        losses = train(run_settings(folder, Path(work) / "run"))
        step = f"step_{SAVED:07d}"
        shutil.copytree(Path(work) / "run" / step, folder / "run" / step)
        save_file(export(folder, Path(work) / "exported"), folder / "exported.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1024:.0f} KiB")


def dump(work: Path) -> None:
    """One global batch of every family, with this interpreter's line: losses, records and gradients, into `work`."""
    line, settings = metadata.version("megatron-core"), []
    for family in FAMILIES:
        changes = {"history__hf_path": str(work / f"{family}-history"), "training__global_batch_size": 4}
        changes |= {"history__store": str(work / f"{family}-losses-{line}"), "training__steps": 1}
        settings.append(make_settings(str(work / family), str(work / "data"), **changes))
    results = run_distributed(run_cases, 1, settings, timeout=600)[0]
    for family, (loss, columns, gradients) in zip(FAMILIES, results, strict=True):
        found = {f"gradient.{name}": value.contiguous() for name, value in gradients.items()}
        found |= {
            name: torch.from_numpy(np.ascontiguousarray(columns[name])) for name in ("loss", "attention", "score")
        }
        selected = torch.from_numpy(np.ascontiguousarray(columns["selected"]).astype(np.uint8))
        save_file(
            found | {"selected": selected, "mean": torch.tensor(loss, dtype=torch.float64)},
            work / f"{family}-{line}.safetensors",
        )


def compare(other: str) -> None:
    """Print for every family how far the lines of this interpreter and of `other` are apart."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_store(work / "data", make_samples(4, seed=3, shortest=20))
        for number, family in enumerate(FAMILIES):
            make_model(work / family, family, seed=10 + number)
            make_model(work / f"{family}-history", family, seed=20 + number)
        for python in (sys.executable, other):
            command = [python, "-W", "ignore", "-m", "tests.helpers.lines", "dump", str(work)]
            subprocess.run(command, cwd=cli.ROOT, env=cli.environment(), check=True)
        print(f"{'family':<18}{'lines':<18}{'loss':>10}{'of a token':>12}{'gradient':>10}{'selected':>10}")
        for family in FAMILIES:
            files = sorted(work.glob(f"{family}-*.*.*.safetensors"))
            assert len(files) == 2, f"two lines are compared: {files}"
            one, two = map(load_file, files)
            names = " ".join(file.stem.removeprefix(f"{family}-") for file in files)
            gradient = max(_apart(one[name], two[name], relative=True) for name in one if name.startswith("gradient."))
            assert one["mean"].isfinite() and all(one[name].abs().sum() > 0 for name in one if "norm" in name), (
                "vacuous"
            )
            mean, token = (_apart(one[name], two[name]) for name in ("mean", "loss"))
            same = "same" if torch.equal(one["selected"], two["selected"]) else "DIFFERENT"
            print(f"{family:<18}{names:<18}{mean:>10.1e}{token:>12.1e}{gradient:>10.1e}{same:>10}")


def _apart(one: torch.Tensor, two: torch.Tensor, *, relative: bool = False) -> float:
    """Largest difference, where defined; `relative` to the largest value, if there is one (not of an expert without tokens)."""
    difference = torch.nan_to_num((one.double() - two.double()).abs()).max().item()
    return difference / (one.abs().max().item() or 1.0) if relative else difference


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "compare", "dump"])
    parser.add_argument("argument", nargs="?", help="compare: the other interpreter; dump: a folder")
    options = parser.parse_args()
    if options.command == "make":
        make(line_folder())
    elif options.command == "dump":
        dump(Path(options.argument))
    else:
        compare(options.argument)


if __name__ == "__main__":
    main()
