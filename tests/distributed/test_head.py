"""The selective head gives the losses and every gradient of the standard one, on every layout and for every selection.

The same model takes the same step with either head; each rank compares its own slices. `pytest -s` prints the table.
Layouts of four ranks are compared with transformers in test_invariance.py, with the selective head.
"""

import pytest

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer

LAYOUTS = {
    "dp2": {},
    "tp2": {"parallel.tensor": 2},
    "tp2-sequence": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "cp2": {"parallel.context": 2},
}
# (family, packed, precision); qwen2 has tied embeddings
CASES = [("llama", True, "fp32"), ("qwen2", False, "fp32"), ("qwen2", True, "bf16")]
# Relative to the largest element of its tensor. bf16 keeps 8 bits, and its roundings add up through the layers.
TOLERANCE = {"fp32": 1e-6, "bf16": 2**-7}


def compare_heads(rank, folder, layout):
    """On each of two ranks: (layout, case, selection, largest differences of losses and gradients, selected here)."""
    from megatron_sstoken.parallel import reset_layout

    rows = []
    for case in CASES:
        trainer = make_trainer(settings_of(folder, case, LAYOUTS[layout]))
        for selection in selections_of(layout, case):
            standard, selective = (one_step(trainer, selection, head) for head in (False, True))
            rows.append((layout, case, selection, *differences(standard, selective), selective[2]))
        reset_layout()
    return rows


def selections_of(layout, case):
    """Two scopes, all tokens, none at all, and none on one data-parallel rank where there are two."""
    if case[2] == "bf16":
        return ["sample", "full"]
    return ["sample", "batch", "full", "none"] + ["none on one rank"] * (layout == "dp2")


def settings_of(folder, case, parallel):
    family, packed, precision = case
    return make_settings(
        f"{folder}/{family}",
        f"{folder}/data",
        data__packing=packed,
        selection__method="attention",  # needs no history
        training__precision=precision,
        training__global_batch_size=4,
        training__micro_batch_size=1,
        **parallel,
    )


def one_step(trainer, selection, selective):
    """Losses of the response tokens, this rank's gradients, and how many tokens it selected."""
    from dataclasses import replace

    from megatron_sstoken.passes.step import select_and_train
    from megatron_sstoken.training.selector import selector_of, train_on_selected

    model, layout, batches = trainer.model, trainer.layout, trainer.loader.load(0)
    for chunk in model.unwrapped:
        chunk.head = replace(chunk.head, selective=selective)
    model.zero_gradients()
    selector = selector_of(trainer.settings, layout, gamma=0.0, step=0)
    if selection.startswith("none"):
        empty = selection == "none" or layout.data_rank == 0

        def nothing_here(report):
            chosen = selector(report)
            return replace(chosen, mask=chosen.mask & (not empty))

        reports = select_and_train(model, batches, nothing_here, whole_gradients=True)
    else:
        changes = {"method": "full"} if selection == "full" else {"scope": selection}
        selector = replace(selector, settings=replace(selector.settings, **changes))
        reports = train_on_selected(model, batches, selector, whole_gradients=True)
    losses = [report.loss[report.batch.response] for report in reports]
    gradients = {n: p.main_grad.clone() for chunk in model.unwrapped for n, p in chunk.named_parameters()}
    return losses, gradients, sum(int(report.selection.mask.sum()) for report in reports)


def differences(standard, selective):
    """Largest difference of any loss (nats), and of any gradient, relative to the largest element of its tensor."""
    losses = [float((a - b).abs().max()) for a, b in zip(standard[0], selective[0], strict=True) if len(a)]
    gradients = [
        float((wanted - selective[1][name]).abs().max() / wanted.abs().max().clamp(min=1e-30))
        for name, wanted in standard[1].items()
    ]
    return max(losses, default=0.0), max(gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_equals_standard(tmp_path, layout):
    for seed, family in enumerate(("llama", "qwen2")):
        make_model(tmp_path / family, family, seed=seed, num_hidden_layers=2)
    make_store(tmp_path / "data", make_samples(40, seed=5, longest=40))
    ranks = run_distributed(compare_heads, 2, str(tmp_path), layout)
    for of_ranks in zip(*ranks, strict=True):
        layout, (family, packed, precision), selection = of_ranks[0][:3]
        loss, gradient = (max(row[column] for row in of_ranks) for column in (3, 4))
        counts = [row[5] for row in of_ranks]
        print(
            f"{layout:<17} {family:<6} {'packed' if packed else 'padded'} {precision} {selection:<17} "
            f"loss ±{loss:.1e}, gradients ±{gradient:.1e}, selected on each rank {counts}"
        )
        where = (layout, family, packed, precision, selection)
        assert loss < (2e-6 if precision == "fp32" else 0.05), where
        assert gradient < TOLERANCE[precision], where
        assert (sum(counts) == 0) == (selection == "none"), where
        assert (counts[0] == 0) == (selection.startswith("none") or layout == "pp2"), where


def passes_that_measure(rank, folder):
    """How many micro-batches there are, and in how many forward passes their attention is measured, by scope."""
    from megatron_sstoken.model.attention import AttentionCapture

    armed = []
    arm = AttentionCapture.arm
    AttentionCapture.arm = lambda capture, context: (armed.append(1), arm(capture, context))[1]
    trainer = make_trainer(settings_of(folder, ("llama", True, "fp32"), {}))
    found = {}
    for scope in ("sample", "batch"):
        armed.clear()
        one_step(trainer, scope, True)
        found[scope] = len(armed)
    return len(trainer.loader.load(0)), found


def test_attention_is_measured_once_whatever_the_number_of_passes(tmp_path):
    make_model(tmp_path / "llama", "llama", num_hidden_layers=2)
    make_store(tmp_path / "data", make_samples(40, seed=5, longest=40))
    ((number, found),) = run_distributed(passes_that_measure, 1, str(tmp_path))
    assert found == {"sample": number, "batch": number}
