"""Formulae against independent counts, and the command line of tools/plan.py."""

import csv
import json
import re
from dataclasses import replace

import pytest

from benchmarks import plan_check
from megatron_sstoken.model.presets import find_architecture
from megatron_sstoken.planner.communication import Traffic
from megatron_sstoken.planner.hardware import GPUS, Assumptions
from megatron_sstoken.planner.memory import adapter_parameters, chunks_in_flight, head_bytes
from megatron_sstoken.planner.search import estimate, propose
from megatron_sstoken.planner.workload import Workload, problems_of_workload
from tests.helpers.workbench import make_model
from tools.plan import main

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
    assert adapter_parameters(w) == 32 * sum(64 * (rows + columns) for rows, columns in shapes)
    full, lora = (estimate(one, GPUS["h100"], Assumptions()).peak for one in (replace(w, lora_rank=0), w))
    assert lora.trainable == adapter_parameters(w) and lora.optimizer < full.optimizer / 10
    assert lora.parameters == full.parameters + adapter_parameters(w)


def test_ring_collectives_send_what_they_must():
    def sent(operation: str) -> float:
        return Traffic("tensor", operation, 1, 800, 4, "nvlink").sent

    assert (sent("all_reduce"), sent("all_gather"), sent("send")) == (1200, 600, 800)


def test_a_selective_head_holds_no_logits_of_the_whole_sequence():
    w = Workload(EIGHT, sequence_length=8192)
    assert head_bytes(w) < head_bytes(replace(w, head="standard")) / 5


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


def test_a_mixture_of_experts_is_refused(tmp_path, capsys):
    assert main(["--model", make_model(tmp_path / "mixture", "mixtral")]) == 2
    assert "is a mixture of experts, for which there is no estimate: name a dense model" in capsys.readouterr().err
