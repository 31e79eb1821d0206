"""Measure the host memory that saving and loading an optimizer's state take: `python benchmarks/checkpoint_memory.py`.

For each number of data-parallel processes, and each form of the state, two processes or more are started over gloo with a
random model. Each saves its state and loads it again; what is told is how far its resident memory rose above what it had
before, in bytes for each parameter, of the process where it rose most. In megatron's own forms `fully_reshardable` (gathered
on all processes) and its memory-efficient variety (gathered on one), and in ours (`checkpoint/optimizer_state.py`).
Appends rows to `benchmarks/results/checkpoint_memory.csv`.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it also runs where the package is not installed

FORMS = ("gathered on all", "gathered on one", "own part")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=int, nargs="+", default=[1, 2, 4], help="numbers of data-parallel processes")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(Path(options.worker))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.hidden, options.layers)
        for data in options.data:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(data), __file__]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "SSTOKEN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
            subprocess.run([*command, "--worker", folder], check=True, env=environment)
            rows += json.loads((Path(folder) / "rows.json").read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    append(options.output / "checkpoint_memory.csv", rows)
    print("| data-parallel processes | form | save | load |\n|---:|---|---:|---:|")
    for row in rows:
        print(f"| {row['data']} | {row['form']} | {row['save'] / row['parameters']:.1f} | ", end="")
        print(f"{row['load'] / row['parameters']:.1f} |")


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama whose parameters lie in its layers for the most part."""
    from transformers import AutoConfig

    from benchmarks.stand_ins import SHAPE, save_random_model

    size = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    save_random_model(folder / "model", AutoConfig.for_model("llama", **(SHAPE | size)))


def work(folder: Path) -> None:
    """One process: every form, saved and loaded; the first process writes down the largest rise of all."""
    from megatron_sstoken.checkpoint.writer import prepare_writer
    from megatron_sstoken.config import Settings
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.optimizer import build_optimizer
    from megatron_sstoken.parallel import create_layout, start_processes, stop_processes

    start_processes()
    settings = Settings()
    layout = create_layout(settings.parallel, seed=1)
    model = build_model(read_architecture(str(folder / "model")), settings, layout, trainable=True)
    optimizer, _ = build_optimizer(model, settings.optimizer, 10)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.data_parallel_group_gloo = part.data_parallel_group  # over gloo as it is; megatron leaves it out on CPUs
    prepare_writer()
    rows = []
    for number, form in enumerate(FORMS):
        # Parameters that a rank holds: what the form costs is a multiple of them.
        row = {
            "data": layout.data_size,
            "form": form,
            "parameters": sum(p.numel() for p in model.chunks[0].parameters()),
        }
        rows.append(row | measure(form, folder / f"{layout.data_size}-{number}", model, optimizer))
    if layout.rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    stop_processes()


def measure(form: str, folder: Path, model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes by which resident memory rises at most on any process, while it saves and while it loads."""
    from megatron.core import dist_checkpointing

    from megatron_sstoken.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state

    metadata = {"dp_cp_group": model.layout.groups.dp_cp}
    if form == "gathered on one":
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = True

    weights = model.unwrapped[0].sharded_state_dict(metadata=metadata)
    sharded_optimizer_state(optimizer, weights, metadata, is_loading=False)  # makes AdamW's tensors, there in any run

    def state(*, is_loading: bool) -> dict[str, Any]:
        if form == "own part":
            return {"optimizer": sharded_optimizer_state(optimizer, weights, metadata, is_loading=is_loading)}
        form_of_it = metadata | {"distrib_optim_sharding_type": "fully_reshardable"}
        return {"optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=form_of_it)}

    if model.layout.rank == 0:
        folder.mkdir()

    def load() -> None:
        loaded = dist_checkpointing.load(state(is_loading=True), str(folder))["optimizer"]
        if form == "own part":  # megatron copies from what is there by now
            load_optimizer_state(optimizer, loaded)

    saved = largest_rise(lambda: dist_checkpointing.save(state(is_loading=False), str(folder)), model.layout)
    return {"save": saved, "load": largest_rise(load, model.layout)}


def largest_rise(action: Callable[[], Any], layout: Any) -> int:
    """How far the resident memory of a process rises in `action`, at most, on the process where that is most."""
    import torch.distributed as dist

    from megatron_sstoken.parallel import gather_objects

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier(group=layout.control)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = status("VmRSS")
    action()
    return max(gather_objects(status("VmHWM") - before, layout))


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
