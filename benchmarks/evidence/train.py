"""One task in one process: train as the project's own program does, and measure at the start, in the middle and at the end.

    python -m benchmarks.evidence.train TASK.json

Nothing is saved but the figures, the probe's tokens and, for a reference, its weights.
"""

import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.evidence.arms import TIMES
from benchmarks.evidence.kinds import KINDS, kind_of_tokens
from megatron_sstoken.config import Settings
from megatron_sstoken.evaluate import main as evaluate
from megatron_sstoken.history.source import open_history
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout, create_layout, start_processes, stop_processes
from megatron_sstoken.passes.columns import gather_columns
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.run_plan import DataPlan, RunPlan
from megatron_sstoken.training.known import open_known
from megatron_sstoken.training.loop import create_trainer, model_to_train, save, training_step
from megatron_sstoken.training.metrics import StepMetrics
from megatron_sstoken.validate.run import plan_run


def main(path: Path) -> None:
    """Train the task that the file describes; writes `result.json` beside it when all is done."""
    task = json.loads(path.read_text())
    torch.set_num_threads(task["threads"])
    settings = settings_of(task["changes"])
    start_processes()
    plan = plan_run(settings, 1)
    layout = create_layout(settings.parallel, settings.training.seed)
    probed = plan.captured_layers or (plan.architecture.num_layers,)
    history = open_history(plan, layout)
    known = open_known(plan, layout, history)
    model = model_to_train(replace(plan, captured_layers=probed) if task["probes"] else plan, layout)
    trained = replace(model, captured_layers=plan.captured_layers)
    trainer = create_trainer(plan, layout, trained, history, known=known)
    data = {name: _data(settings, folder) for name, folder in task["measured"].items()}
    marks = dict(zip((0, plan.num_steps // 2, plan.num_steps), TIMES, strict=True))
    found: dict = {"steps": plan.num_steps, "measures": {}, "train": []}
    seconds = tokens = 0.0
    for step in range(plan.num_steps + 1):
        if step in marks:
            if marks[step] in task["probes"]:
                into = path.parent / f"probe_{marks[step]}.parquet"
                _write_probe(model, _data(settings, task["probe"]), plan, layout, into)
            if step == plan.num_steps or (step == 0 and task["before"]):
                found["measures"][step] = {
                    name: _losses(trained, one, plan, layout, task["tokenizer"]) for name, one in data.items()
                }
            trained.train(True)
        if step == plan.num_steps:
            break
        begun = time.perf_counter()
        rate = trainer.optimizer.param_groups[0]["lr"]
        metrics, norm, _ = training_step(trainer, step)
        trainer.step = step + 1
        seconds += time.perf_counter() - begun
        tokens += metrics.num_tokens
        trainer.drift.observe(metrics.dropped_excess)
        found["train"].append(_of_step(metrics) | {"learning_rate": rate, "gradient_norm": norm})
        print(f"step {step + 1}/{plan.num_steps} loss {metrics.loss_all:.4f}", flush=True)
    found |= {"seconds": seconds, "tokens": tokens, "weights": _digest(model), "threads": task["threads"]}
    if task["export"]:
        save(trainer)
    trainer.prefetcher.close()
    trainer.logger.close()
    stop_processes()
    if task["export"]:
        _export(settings.checkpoint.directory, task["export"])
    if task["questions"]:
        found["right"] = {plan.num_steps: _share_right(task["export"], task, path.parent)}
        if task["ask_before"]:
            found["right"][0] = _share_right(settings.model.hf_path, task, path.parent)
        shutil.rmtree(task["export"])
    partial = path.parent / "result.partial"
    partial.write_text(json.dumps(found))
    partial.rename(path.parent / "result.json")


def settings_of(changes: dict) -> Settings:
    """The defaults with `section.name` → value changed."""
    settings = Settings()
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        setattr(settings, section, replace(getattr(settings, section), **{setting: value}))
    return settings


def _export(checkpoints: str | None, folder: str) -> None:
    command = [
        "tools/convert_checkpoint.py",
        "to-hf",
        "--checkpoint",
        str(checkpoints),
        "--output",
        folder,
        "--overwrite",
    ]
    subprocess.run([sys.executable, *command], check=True)


def _share_right(model: str | None, task: dict, folder: Path) -> float:
    """Of the held-out questions, the share that a model answers right, greedily."""
    answers = folder / "answers.jsonl"
    options = ["--model", str(model), "--data", task["questions"], "--output", str(answers), "--overwrite"]
    options += ["--limit", str(task["asked"]), "--batch_size", str(task["asked"]), "--max_new_tokens", "256"]
    if evaluate(options):
        raise RuntimeError(f"{model} could not be asked")
    return statistics.mean(json.loads(line)["is_right"] for line in answers.read_text().splitlines())


def _data(settings: Settings, folder: str) -> DataPlan:
    """A prepared folder as the run would read it, every sample whole."""
    validation = replace(settings.data, train=folder, validation=None)
    return plan_run(replace(settings, data=validation, selection=replace(settings.selection, method="full")), 1).train


def _losses(model: Model, data: DataPlan, plan: RunPlan, layout: Layout, tokenizer: str) -> dict[str, float]:
    """Mean loss in nats over response tokens: `all`, and of each kind."""
    sums = dict.fromkeys(("all", *KINDS), 0.0)
    counts = dict.fromkeys(sums, 0)
    for _, reports in scored_batches(model, sequential_loader(data, plan, layout), layout, title="losses"):
        columns = gather_columns(reports, layout)
        assert columns is not None, "one process"
        response = (columns["role"] == 1) & (columns["position"] > 0)
        kinds = kind_of_tokens(columns["token"], tokenizer)
        for name in sums:
            mask = response if name == "all" else response & (kinds == name)
            sums[name] += float(columns["loss"][mask].astype("float64").sum())
            counts[name] += int(mask.sum())
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


def _write_probe(model: Model, data: DataPlan, plan: RunPlan, layout: Layout, path: Path) -> None:
    """Signals of every response token of the probe, as the weights of now make them."""
    tables = []
    for _, reports in scored_batches(model, sequential_loader(data, plan, layout), layout, title="probe"):
        columns = gather_columns(reports, layout)
        assert columns is not None, "one process"
        kept = (columns["role"] == 1) & (columns["position"] > 0)
        names = ("sample", "position", "token", "loss", "attention", "entropy")
        tables.append(pa.table({name: columns[name][kept] for name in names}))
    pq.write_table(pa.concat_tables(tables), path)


def _of_step(metrics: StepMetrics) -> dict[str, float]:
    values = {
        "loss_all": metrics.loss_all,
        "loss_selected": metrics.loss_selected,
        "dropped_minus_history": metrics.dropped_excess,
        "share": metrics.share_selected,
        "weight_mean": metrics.weight_mean,
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _digest(model: Model) -> str:
    """Of all weights: equal for equal weights, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in model.unwrapped[0].named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
