"""The text of a run plan."""

import math

from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from tests.helpers.plans import NUM_SAMPLES
from tests.helpers.workbench import make_samples


def facts_of(text: str) -> dict[str, str]:
    """Name → value of each line of a described plan."""
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_description(settings, folder):
    changes = {"training__micro_batch_size": 2, "training__epochs": 2, "parallel__tensor": 2}
    samples = make_samples(NUM_SAMPLES)
    lengths = [min(len(sample.tokens), 50) for sample in samples]
    long = sum(len(sample.tokens) > 50 for sample in samples)
    assert 0 < long < NUM_SAMPLES
    facts = facts_of(describe(plan_run(settings(data__sequence_length=50, **changes), 4)))
    assert facts["model"].startswith("llama, 37,344 parameters, 4 layers")
    assert facts["vocabulary"] == "99, padded to 128"
    assert facts["processes"] == "4 = tensor 2 × pipeline 1 × context 1 × data 2"
    assert facts["data"] == (
        f"20 samples, {sum(lengths):,} tokens, longest 50 ({long} truncated, 0 dropped, 0 left without response)"
    )
    mean = sum(lengths) / NUM_SAMPLES
    assert facts["batch"] == (
        f"8 packs = micro-batch 2 × data 2 × accumulation 2; about {math.ceil(mean * 8)} real tokens a step"
    )
    assert facts["packs"] == "20 of up to 50 tokens an epoch, one sample each, padded to the longest of its batch"
    assert facts["steps"] == "5 (2 epochs)"
    assert facts["selection"] == (
        "sstoken, rho 0.6, scope sample, loss averaged by token, gamma 0.5, layer -1, history frozen (starting weights)"
    )
    assert facts["precision"] == "fp32" and facts["checkpoints"] == "none"


def test_exploration_and_what_is_done_about_drift(settings, folder):
    def of(**changes) -> str:
        return facts_of(describe(plan_run(settings(**changes), 1)))["selection"]

    assert "layer -1, 0.2 of it drawn at random, history" in of(selection__explore=0.2)
    assert of(selection__on_drift="explore").endswith("(starting weights), on drift explore")
    assert "drift" not in of(selection__on_drift="explore", selection__method="random")


def test_description_of_other_runs(settings, folder):
    plan = plan_run(
        settings(
            parallel__pipeline=2,
            parallel__virtual_pipeline=2,
            parallel__tensor=2,
            parallel__sequence=True,
            training__steps=5,
            selection__method="full",
            checkpoint__directory="runs/1",
        ),
        4,
    )
    facts = facts_of(describe(plan))
    assert facts["processes"] == ("4 = tensor 2 × pipeline 2 (× 2 chunks) × context 1 × data 1, sequence parallel")
    assert facts["steps"] == "5 (2 epochs)"
    size = 16 * (37_344 + 2 * 32 * (128 - 99))  # fp32, with the padding of both tables
    assert facts["checkpoints"] == (
        f"runs/1, at the end: {size / 1e3:.3g} KB, about 0.1 s to write at 2 GB/s a node, while training goes on"
    )
    assert facts["selection"] == "full: every response token"
    random = plan_run(
        settings(
            selection__method="random",
            selection__rho=0.25,
            checkpoint__directory="runs/2",
            checkpoint__save_every=100,
            checkpoint__save_minutes=30,
            checkpoint__asynchronous=False,
        ),
        1,
    )
    told = facts_of(describe(random))["checkpoints"]
    assert told.startswith("runs/2, every 100 steps and every 30 minutes and at the end: ")
    assert told.endswith("while training waits")
    assert facts_of(describe(random))["selection"] == "random, rho 0.25, scope sample, loss averaged by token"


def test_what_is_done_for_history(settings):
    """Frozen history of what the run visits; history of the visit before, after first visits."""

    def told(**changes):
        return facts_of(describe(plan_run(settings(**changes), 1))).get("history")

    rest = "are scored before the first step, unless the store holds them"
    assert told() == f"all {NUM_SAMPLES} samples {rest}"
    assert told(training__steps=2) == f"16 of {NUM_SAMPLES} samples, those that the run visits, {rest}"
    assert told(selection__method="full") is None
    assert told(history__source="adapters_off", lora__rank=2) is None
    tokens = sum(len(sample.tokens) for sample in make_samples(NUM_SAMPLES))
    visits = {"history__source": "previous_visit", "checkpoint__directory": "runs/3"}
    assert told(training__epochs=3, **visits) == (
        f"all {NUM_SAMPLES} samples {rest}; then losses of the visit before, {4 * tokens / 1e3:.3g} KB on disk for each of "
        "3 epochs"
    )
    alone = "no sample is visited twice in this run: "
    assert told(training__steps=1, **visits).endswith(f"{rest}; {alone}this is history.source=frozen")
    full = told(history__first_visit="full", **visits)
    assert full == f"first visits are trained in full; {alone}nothing is selected"


def test_packing_of_a_plan(settings):
    """Rows are counted as the batches will hold them; the arithmetic is of packed rows."""
    plan = plan_run(settings(data__packing=True, training__epochs=2, training__global_batch_size=2), 1)
    tokens = sum(len(sample.tokens) for sample in make_samples(NUM_SAMPLES))
    rows = plan.train.order.num_packs(1)
    assert tokens / 128 <= rows < NUM_SAMPLES / 2 and plan.num_packs == plan.train.order.num_packs(2)
    assert plan.num_steps == math.ceil(plan.num_packs / 2)
    facts = facts_of(describe(plan))
    assert facts["packs"] == (
        f"{rows} of up to 128 tokens an epoch, packed {NUM_SAMPLES / rows:.1f} samples each, "
        f"{100 * tokens / rows / 128:.1f} % full"
    )
    assert facts["batch"].endswith(f"about {math.ceil(tokens / rows * 2)} real tokens a step")
