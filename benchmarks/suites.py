"""The suites of `tools/benchmark.py`: each measures one claim of docs/performance.md and appends its rows."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import workload
from benchmarks.file_suites import conversion, preparation
from benchmarks.hf_loop import HuggingFaceLoop
from benchmarks.measure import Rows, alternate, count
from benchmarks.workload import Options, make, make_trainer, settings_for, typical_batch, use
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.history.frozen import build_history
from megatron_sstoken.model.attention import sample_bounds
from megatron_sstoken.model.backend import compiler_problem
from megatron_sstoken.model.head import IGNORE_INDEX
from megatron_sstoken.passes.micro_batch import micro_batch
from megatron_sstoken.passes.step import score_batch, select_and_train
from megatron_sstoken.selection.methods import Selection
from megatron_sstoken.training.loop import Trainer, training_step
from megatron_sstoken.training.selector import selector_of, signals_of, train_on_selected

STEP_ROWS = 8  # the paper's recipe has global batches of 48 samples; eight rows hold about 40
COMPARED_ROWS = 4  # with transformers: some 20 samples


def prepared(options: Options) -> None:
    """Make the workload on rank 0 while the others wait."""
    if dist.get_rank() == 0:
        make(options.gsm8k, options.work, options.shape, options.num_problems)
    dist.barrier()


def _shares(trainer: Trainer, number: int) -> dict[str, Any]:
    """Positions and response share of a global batch."""
    batches = trainer.loader.load(number)
    positions = sum(batch.response.numel() for batch in batches)
    return {
        "positions": positions,
        "response_share": round(sum(int(batch.response.sum()) for batch in batches) / positions, 4),
    }


def step(options: Options) -> None:
    """Whole optimizer steps of eight rows: plain fine-tuning and ssToken, each head."""
    trainer = make_trainer(settings_for(options.work, tensor=options.tensor, training__global_batch_size=STEP_ROWS))
    number = typical_batch(trainer)
    cases = {
        "full, standard head": ("full", "standard"),
        "ssToken, standard head": ("sstoken", "standard"),
        "ssToken, selective head": ("sstoken", "selective"),
    }

    def variant(method: str, head: str):
        def run():
            use(trainer, method, head)
            training_step(trainer, number)

        return run

    variants = {name: variant(*case) for name, case in cases.items()}
    timings = alternate(variants, options.rounds)
    rows = Rows("step", options.config(rho=trainer.settings.selection.rho))
    for name, timing in timings.items():
        rows.add("packed 1024", name, timing, count(variants[name]), **_shares(trainer, number))
    rows.append()


def head(options: Options) -> None:
    """The head alone, forward and backward, over shares of response and of kept tokens."""
    trainer = make_trainer(settings_for(options.work, tensor=options.tensor))
    chunk, num_tokens = trainer.model.unwrapped[-1], 1024
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 1, options.shape.hidden, generator=generator)
    words = torch.randint(chunk.head.vocabulary_size, (1, num_tokens), generator=generator)
    place = torch.rand(num_tokens, generator=generator)

    kinds = ["standard", "selective", *([] if compiler_problem() else ["selective, compiled"])]

    def run(kind: str, response: float, kept: float):
        chunk.head = replace(chunk.head, selective=kind != "standard", compiled=kind == "selective, compiled")
        labels = words.masked_fill(place >= response, IGNORE_INDEX)
        leaf = hidden.clone().requires_grad_()
        nothing = dict.fromkeys(("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))
        losses = chunk._postprocess(hidden_states=leaf, labels=labels, **nothing)
        torch.where(place < response * kept, losses[0], 0.0).sum().backward()

    rows = Rows("head", options.config(tokens=num_tokens))
    for response, kept in ((0.6, 0.6), (0.3, 0.6), (0.6, 0.3), (1.0, 0.6), (1.0, 1.0)):
        variants = {kind: partial(run, kind, response, kept) for kind in kinds}
        timings = alternate(variants, options.rounds)
        for kind, timing in timings.items():
            formula = 1.0 if kind == "standard" else round(response * (1 + 3 * kept) / 3, 4)
            rows.add(f"r {response}, rho {kept}", kind, timing, count(variants[kind]), formula=formula)
    rows.append()


def scoring(options: Options) -> None:
    """What selection adds to a step: the attention capture, the side channel and selection, against given masks."""
    trainer = make_trainer(settings_for(options.work, tensor=options.tensor))
    model, settings = trainer.model, trainer.settings
    selector = selector_of(settings, trainer.layout, gamma=0.5, step=0)
    number = typical_batch(trainer)
    batches = trainer.loader.load(number)
    (report,) = score_batch(model, batches)
    masks: list[Selection] = [selector(report)]

    def with_scoring():
        model.captured_layers = trainer.plan.captured_layers
        model.zero_gradients()
        train_on_selected(model, batches, selector)

    def without():
        model.captured_layers = ()
        model.zero_gradients()
        # The same tokens cost the same: all responses are scored, the masked ones are trained on.
        select_and_train(model, batches, lambda _: masks[0])

    rows = Rows("scoring", options.config())
    timings = alternate({"masks given": without, "ssToken": with_scoring}, options.rounds)
    for name, timing in timings.items():
        rows.add("forward and backward", name, timing, **_shares(trainer, number))
    # The two parts by themselves, free of the noise of the rest: many runs each, as a share of the step.
    whole = timings["ssToken"].seconds
    for name, run in (
        ("attention mass", _mass(trainer, batches[0])),
        ("score and selection", lambda: selector(report)),
    ):
        parts = alternate({name: partial(_repeat, run, 10)}, options.rounds)[name]
        share = replace(parts, seconds=parts.seconds / 10, baseline=whole)
        rows.add("share of the step", name, share, **_shares(trainer, number))
    rows.append()


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def _mass(trainer: Trainer, batch: TokenBatch):
    """One measurement of the attention to the context in the captured layer, on queries and keys of the right shape."""
    layer = trainer.model.unwrapped[-1].decoder.layers[-1].self_attention
    config = trainer.model.config
    size = trainer.layout.tensor_size
    num_tokens = batch.position.numel()
    query = torch.randn(num_tokens, config.num_attention_heads // size, config.kv_channels)
    key = torch.randn(num_tokens, config.num_query_groups // size, config.kv_channels)
    bounds = sample_bounds(batch.lengths)
    indicator = batch.context.float()[:, None, None].expand(key.shape).contiguous()

    def run():
        with torch.no_grad():
            layer.core_attention(query, key, indicator, None, packed_seq_params=bounds)

    return run


def selection(options: Options) -> None:
    """Selecting in one micro-batch, by scope, against a Python loop over samples that asks for every number."""
    trainer = make_trainer(settings_for(options.work, tensor=options.tensor))
    number = typical_batch(trainer)
    (report,) = score_batch(trainer.model, trainer.loader.load(number))
    signals = signals_of(report)
    rows = Rows("selection", options.config())

    def loop():
        mask = torch.zeros_like(signals.response)
        for number in range(signals.num_segments):
            index = ((signals.segment == number) & signals.response).nonzero().flatten()
            rel = [float(signals["history_loss"][i].item() - signals["loss"][i].item()) for i in index]
            low, high = min(rel), max(rel)
            scores = [
                0.5 * (value - low) / (high - low + 1e-8) + 0.5 * signals["attention"][i].item()
                for value, i in zip(rel, index, strict=True)
            ]
            for best in torch.tensor(scores).topk(max(1, round(0.6 * len(scores)))).indices:
                mask[index[best]] = True

    variants: dict[str, Callable[[], Any]] = {"Python loop": loop}
    for scope in ("sample", "microbatch"):
        settings = replace(trainer.settings.selection, scope=scope)
        selector = replace(selector_of(trainer.settings, trainer.layout, gamma=0.5, step=0), settings=settings)
        variants[f"scope {scope}"] = partial(selector, report)
    for name, timing in alternate(variants, 4 * options.rounds).items():
        rows.add(f"{int(signals.response.sum())} tokens", name, timing, **_shares(trainer, number))
    rows.append()


def history(options: Options) -> None:
    """History scoring, files and all, against forward passes alone."""
    trainer = make_trainer(settings_for(options.work, tensor=options.tensor))
    model, plan, layout = trainer.model, trainer.plan, trainer.layout
    model.captured_layers = ()
    batches = [trainer.loader.load(number)[0] for number in range(plan.train.order.num_packs(1))]
    rows = Rows("history", options.config())
    positions = sum(batch.response.numel() for batch in batches)
    share = round(sum(int(batch.response.sum()) for batch in batches) / positions, 4)
    counter = iter(range(1000))
    folder = Path(tempfile.mkdtemp(dir=options.work)) if dist.get_rank() == 0 else options.work

    def forward(kind: str):
        for chunk in model.unwrapped:
            chunk.head = replace(chunk.head, selective=kind == "selective")
        model.train(False)
        with torch.no_grad():
            for batch in batches:
                one = micro_batch(model, batch)
                model.chunks[0](
                    one.tokens.unsqueeze(0),
                    one.position.unsqueeze(0),
                    None,
                    labels=one.labels.unsqueeze(0),
                    packed_seq_params=one.bounds,
                )

    def score():
        for chunk in model.unwrapped:
            chunk.head = replace(chunk.head, selective=True)
        build_history(lambda: model, plan, layout, str(folder / str(next(counter))), {})

    variants = {
        "forward, selective head": lambda: forward("selective"),
        "forward, standard head": lambda: forward("standard"),
        "history scoring": score,
    }
    for name, timing in alternate(variants, options.rounds).items():
        rows.add(f"{len(batches)} rows", name, timing, positions=positions, response_share=share)
    rows.append()
    if folder != options.work:
        shutil.rmtree(folder)


def huggingface(options: Options) -> None:
    """An optimizer step of ours and of a Hugging Face loop on the same samples; then one sample of growing length.

    Ours packs the samples into rows; the loop takes them shuffled, as its data loader would.
    """
    assert options.tensor == 1, "one process"
    loops = {kind: HuggingFaceLoop(options.work / "model", kind) for kind in ("recomputed", "returned")}
    rows = Rows("huggingface", options.config())

    def compare(trainer: Trainer, number: int, case: str, rounds: int) -> None:
        index = np.concatenate([row.tolist() for row in trainer.loader.packs(number)]).astype(int)
        np.random.default_rng(0).shuffle(index)
        store = trainer.loader.store
        samples, roles = [store.tokens(i) for i in index], [store.roles(i) for i in index]
        variants: dict[str, Callable[[], Any]] = {"megatron_sstoken": lambda: training_step(trainer, number)}
        for kind, loop in loops.items():
            variants[f"Hugging Face, attention {kind}"] = partial(loop.step, samples, roles)
        num_tokens = sum(map(len, samples))
        for name, timing in alternate(variants, rounds).items():
            speed = round(num_tokens / timing.columns()["seconds"], 1)
            rows.add(case, name, timing, count(variants[name]), tokens=num_tokens, tokens_per_second=speed)
        rows.append()  # now: the longest samples take minutes
        rows.rows.clear()

    trainer = make_trainer(settings_for(options.work, training__global_batch_size=COMPARED_ROWS))
    compare(trainer, typical_batch(trainer), "GSM8K", options.rounds)
    alone = {"data__packing": False, "data__shuffle": False, "data__sequence_length": max(workload.LENGTHS)}
    trainer = make_trainer(settings_for(options.work, data="lengths", **alone))
    for number, length in enumerate(workload.LENGTHS):
        compare(trainer, number, f"one sample of {length}", options.rounds)


SUITES = {
    "step": step,
    "head": head,
    "scoring": scoring,
    "selection": selection,
    "history": history,
    "huggingface": huggingface,
    "prepare": preparation,
    "convert": conversion,
}
