"""Formulae against independent counts, and the command line of tools/plan.py."""

import csv
import json
import re
from dataclasses import replace

import pytest

from benchmarks import plan_check
from megatron_sstoken.commands.plan import main
from megatron_sstoken.gpus import GPUS
from megatron_sstoken.model.presets import find_architecture
from megatron_sstoken.planner.communication import Traffic
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import adapter_parameters, chunks_in_flight, head_bytes
from megatron_sstoken.planner.search import estimate, propose
from megatron_sstoken.planner.workload import Workload, problems_of_workload
from tests.helpers.workbench import make_model

EIGHT = find_architecture("Llama-3.1-8B")
SEVENTY = find_architecture("Llama-3.1-70B")


def test_published_throughput_lies_between_no_overlap_and_full_overlap():
    w = Workload(
        SEVENTY, world_size=32, tensor=4, pipeline=4, virtual_pipeline=5, sequence=True, sequence_length=4096,
        global_batch_size=32, precision="fp8", selects=False,
    )  # fmt: skip
    slow, fast = (estimate(w, GPUS["h100"], Assumptions(tensor_exposed=share)).speed for share in (1.0, 0.0))
    assert slow.tokens_per_gpu < 1638 < fast.tokens_per_gpu


def test_the_published_comparison_in_the_docs_is_todays(capsys):
    with open(plan_check.ROOT / "benchmarks" / "results" / "plan_published.csv", newline="") as file:
        written = list(csv.DictReader(file))
    rows = [{name: str(value) for name, value in row.items()} for row in plan_check.check_published()]
    assert written == rows, "run benchmarks/plan_check.py published, and look at docs/planning.md"


def test_published_layouts_of_70b_fit_with_gradients_and_moments_in_bf16():
    """Megatron-Bridge: SFT on 32 H100 in bf16 and FP8, and pre-training on 64 in FP8; with fp32 none does."""
    sft = {"world_size": 32, "tensor": 4, "pipeline": 4, "virtual_pipeline": 5, "sequence_length": 4096}
    pretraining = {"world_size": 64, "tensor": 4, "pipeline": 8, "virtual_pipeline": 5, "sequence_length": 8192}
    small = {"gradient_dtype": "bf16", "first_moment_dtype": "bf16", "second_moment_dtype": "bf16"}
    for layout, batch, precision in ((sft, 32, "bf16"), (sft, 32, "fp8"), (pretraining, 128, "fp8")):
        w = Workload(SEVENTY, sequence=True, selects=False, global_batch_size=batch, precision=precision, **layout)
        assert estimate(w, GPUS["h100"], Assumptions()).excess > 0
        assert estimate(replace(w, **small), GPUS["h100"], Assumptions()).excess < 0


@pytest.mark.parametrize(("pipeline", "virtual", "micro"), [(4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8)])
def test_chunks_in_flight_against_a_run_of_the_schedule(pipeline, virtual, micro):
    for stage in range(pipeline):
        ahead = pipeline - stage - 1 if virtual == 1 else 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline
        total = micro * virtual
        alive = most = done = 0
        for forward in range(total):
            alive += 1
            most = max(most, alive)
            if forward >= min(ahead, total):
                alive, done = alive - 1, done + 1
        w = Workload(SEVENTY, world_size=pipeline, pipeline=pipeline, virtual_pipeline=virtual, global_batch_size=micro)
        assert chunks_in_flight(w, stage) == most


def test_adapters_of_all_seven_linears():
    w = Workload(EIGHT, lora_rank=64)
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    assert adapter_parameters(w, 0) == 32 * sum(64 * (rows + columns) for rows, columns in shapes)
    full, lora = (estimate(one, GPUS["h100"], Assumptions()).peak for one in (replace(w, lora_rank=0), w))
    assert lora.trainable == adapter_parameters(w, 0) and lora.optimizer < full.optimizer / 10
    assert lora.parameters == full.parameters + adapter_parameters(w, 0)
    whole = estimate(replace(w, train_whole=("embed_tokens", "lm_head")), GPUS["h100"], Assumptions()).peak
    assert whole.trainable - lora.trainable == 2 * 4096 * w.vocabulary and whole.parameters == lora.parameters


def test_ring_collectives_send_what_they_must():
    def sent(operation: str) -> float:
        return Traffic("tensor", operation, 1, 800, 4, "nvlink").sent

    assert (sent("all_reduce"), sent("all_gather"), sent("send")) == (1200, 600, 800)


def test_a_selective_head_holds_no_logits_of_the_whole_sequence():
    w = Workload(EIGHT, sequence_length=8192)
    assert head_bytes(w) < head_bytes(replace(w, head="standard")) / 5


def test_state_gradients_and_activations_that_take_less_memory():
    """Against hand counts: 4 bytes of master weight and the moments', over the replicas; gradients whole."""
    w = Workload(EIGHT, world_size=4, tensor=2, sequence=True, sequence_length=4096, global_batch_size=96)
    plain = estimate(w, GPUS["h100"], Assumptions())
    number = plain.peak.trainable

    def peak(**changes):
        return estimate(replace(w, **changes), GPUS["h100"], Assumptions()).peak

    assert (plain.peak.gradients, plain.peak.optimizer) == (number * 4, number // 2 * 12) and plain.peak.update == 0
    assert peak(gradient_dtype="bf16").gradients == number * 2
    assert peak(first_moment_dtype="fp8", second_moment_dtype="bf16").optimizer == number // 2 * 7
    half = peak(offload_fraction=0.5)
    assert (half.optimizer, half.host) == (number // 4 * 16, number // 4 * 16)
    assert peak(offload_fraction=1.0).optimizer == 0
    some = peak(offload_layers=12)
    assert some.activations == pytest.approx(plain.peak.activations * (32 - 12 + 2) / 32, rel=0.01)
    assert some.host == pytest.approx(plain.peak.activations * 12 / 32, rel=0.01)
    assert all(one.total < plain.peak.total for one in (half, some, peak(gradient_dtype="bf16")))


def test_temporaries_of_the_optimizers_step_count_where_activations_do_not_cover_them():
    """Of few tokens and many parameters on one rank: two moments, 4 bytes each."""
    w = Workload(EIGHT, sequence_length=128, global_batch_size=1, second_moment_dtype="bf16", first_moment_dtype="bf16")
    found = estimate(w, GPUS["b200"], Assumptions()).peak
    assert found.update == 8 * found.trainable - found.activations - found.head - found.working > 0


def test_what_lies_in_the_hosts_memory_costs_time():
    w = Workload(EIGHT, world_size=8, tensor=2, sequence=True, sequence_length=4096, global_batch_size=16)

    def speed(**changes):
        return estimate(replace(w, **changes), GPUS["h100"], Assumptions()).speed

    shard = estimate(w, GPUS["h100"], Assumptions()).peak.trainable / 4
    assert speed(offload_fraction=1.0).optimizer == pytest.approx(shard * 28 / (76.8e9 * 0.6))  # memory, not the link
    assert speed().optimizer < speed(offload_fraction=0.5).optimizer < speed(offload_fraction=1.0).optimizer
    # Of few tokens the transfers take longer than the computation; attention over many grows with their square.
    few, many = (speed(offload_layers=20, sequence_length=length).offload for length in (4096, 131072))
    assert few > 0 and many == 0
    assert speed(gradient_dtype="bf16").optimizer < speed().optimizer


def test_stages_that_differ_wait_for_the_longest():
    w = Workload(
        SEVENTY, world_size=64, tensor=8, pipeline=4, sequence=True, sequence_length=4096, global_batch_size=64
    )
    even, uneven = (estimate(one, GPUS["h100"], Assumptions()) for one in (w, replace(w, first_stage_layers=26)))
    assert [stage.parameters for stage in uneven.memory[1:3]] < [stage.parameters for stage in even.memory[1:3]]
    assert uneven.workload.stage_layers == [26, 18, 18, 18] and even.workload.stage_layers == [20] * 4
    assert uneven.speed.step > even.speed.step and uneven.peak.stage == 0


def test_proposals_fit_run_and_are_sorted():
    w = Workload(SEVENTY, world_size=64, sequence_length=4096, global_batch_size=64)
    proposals = propose(w, GPUS["h100"], Assumptions())
    assert proposals and all(one.excess <= 0 and not problems_of_workload(one.workload) for one in proposals)
    steps = [one.speed.step for one in proposals]
    assert steps == sorted(steps)


def test_exit_codes_and_output(capsys):
    fits = "--model Llama-3.2-1B --gpu h100 --sequence_length 4096 --backend transformer_engine".split()
    assert main(fits) == 0
    text = capsys.readouterr().out
    assert "fits: stage 0" in text and "matmul_fp8" in text and "datasheet" in text
    assert max(map(len, text.splitlines())) <= 120
    assert main([*fits[:-2], "--implementation", "torch"]) == 0 and "bf16, torch" in capsys.readouterr().out
    assert main([*fits, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["memory"][0]["parameters"] == 1_235_814_400
    assert main(["--model", "Llama-3.1-70B", "--world_size", "8", "--tensor", "8", "--global_batch_size", "8"]) == 1
    assert "GiB too much" in capsys.readouterr().out
    assert main(["--model", "Llama-3.1-70B", "--world_size", "8", "--global_batch_size", "8", "--propose"]) == 1
    assert "no layout of 8 GPUs fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--world_size 6 --tensor 3", r"parallel\.tensor=3 does not divide model\.num_attention_heads=32"),
        ("--world_size 8 --global_batch_size 12", r"training\.global_batch_size=12 is not a multiple"),
        ("--gpu a100-80 --precision fp8", "has no FP8 units"),
        ("--precision fp8 --fp8_recipe mxfp8", r"H100 SXM 80 GB has compute capability 9\.0, mxfp8 needs 10\.x"),
        ("--precision fp8 --backend torch", "model.backend=torch cannot compute in training.precision=fp8"),
        ("--precision fp8 --lora_rank 16 --propose", "training.precision=fp8 has no adapters"),
        ("--propose --response 2", r"response=2\.0 is outside"),
        ("--propose --rho 2", r"selection\.rho=2\.0 is outside"),
        ("--assume matmul=abc", "'abc' is not a number"),
        ("--assume speed=2", "there is no assumption 'speed'"),
        ("--assume links=0", "use a number above 0"),
    ],
)
def test_mistakes_are_told_in_the_words_of_a_run(capsys, options, message):
    assert main(["--model", "Llama-3.1-8B", *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_delta_nets_are_estimated_and_mixtures_refused(tmp_path, capsys):
    command = ["--model", make_model(tmp_path / "delta nets", "qwen3_5_text"), "--world_size", "2"]
    assert main([*command, "--sequence_length", "512", "--lora_rank", "8"]) == 0
    assert "fits: stage 0 needs" in capsys.readouterr().out
    assert main(["--model", make_model(tmp_path / "mixture", "mixtral")]) == 2
    assert "is a mixture of experts, for which there is no estimate: name a dense model" in capsys.readouterr().err
