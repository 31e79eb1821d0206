"""What the look at machines concludes from facts that tests make up, and what four processes find out about this one."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_sstoken.preflight import __main__ as program
from megatron_sstoken.preflight import measure
from megatron_sstoken.preflight.findings import Facts, describe, judge
from tests.helpers import cli
from tests.helpers.distributed_runner import free_port, run_distributed

VERSIONS = {"torch": "2.13.0", "NCCL": "2.29.7", "transformer-engine": "2.11.0", "NVIDIA driver": "580.95.05"}
LINKS = {"within": 380.0, "between": 45.0, "matrix": 650.0}


def machines(number=3, processes=2) -> list[Facts]:
    """Sound ones with GPUs."""
    return [
        Facts(
            rank=node * processes + local, node=node, host=f"node{node}", versions=VERSIONS, gpu="NVIDIA H100 80GB HBM3",
            gpu_bytes=80 << 30, speeds=LINKS if local == 0 else {"within": 380.0, "matrix": 650.0}, disk=1 << 40,
        )
        for node in range(number)
        for local in range(processes)
    ]  # fmt: skip


def with_change(rank: int, **changes) -> list[Facts]:
    facts = machines()
    facts[rank] = replace(facts[rank], **changes)
    return facts


def test_machines_that_are_alike_can_start():
    facts = machines()
    assert judge(facts, "runs") == []
    told = describe(facts, [], "runs")
    assert told.startswith("6 processes on 3 machines, NVIDIA H100 80GB HBM3, 80 GiB")
    assert "runs is shared by all machines" in told and told.endswith("a run can start")
    assert "node2 (machine 2)            380.00 GB/s  45.00 GB/s   650 TFLOP/s" in told


@pytest.mark.parametrize(
    ("rank", "changes", "kind", "told"),
    [
        (2, {"versions": VERSIONS | {"torch": "2.12.0"}}, "error", "torch 2.12.0, node0 (machine 0) has 2.13.0, and a run"),
        (2, {"versions": VERSIONS | {"transformer-engine": None}}, "error", "transformer-engine absent, node0 (machine 0) has"),
        (2, {"versions": VERSIONS | {"NVIDIA driver": "550.54.15"}}, "warning", "NVIDIA driver 550.54.15, node0 (machine 0)"),
        (3, {"gpu": "NVIDIA A100-SXM4-80GB"}, "warning", "NVIDIA A100-SXM4-80GB, process 0 has NVIDIA H100 80GB HBM3: use"),
        (3, {"gpu": None}, "error", "no GPU, process 0 has NVIDIA H100 80GB HBM3"),
        (3, {"gpu_bytes": 94 << 30}, "warning", "94 GiB of GPU memory, process 0 has 80: plan for the least"),
        (2, {"speeds": LINKS | {"within": 11.0}}, "warning", "all-reduce with its GPUs at 11.0 GB/s, below 20: look at"),
        (2, {"speeds": LINKS | {"between": 1.1}}, "warning", "neighbours at 1.1 GB/s, below 5: set NCCL_SOCKET_IFNAME"),
        (2, {"speeds": LINKS | {"between": 20.0}}, "warning", "neighbours at 20.0 GB/s, half of the machines have 45.0"),
        (2, {"speeds": LINKS | {"between": 0.0}}, "error", "all-reduce with its neighbours does not end within 120 s"),
        (3, {"speeds": {"within": 380.0, "matrix": 500.0}}, "warning", "500 TFLOP/s in bf16, half of the GPUs have 650"),
        (2, {"clock": -3.5}, "warning", "its clock is -3.5 s from node0 (machine 0)'s, more than 1 s: start chronyd or ntpd"),
        (2, {"folder_problem": "runs does not show"}, "error", "runs does not show: mount it there, or name another --folder"),
        (2, {"doctor": (("error", "megatron.core does not import"),)}, "error", "megatron.core does not import"),
    ],
)  # fmt: skip
def test_each_finding_names_machine_value_rule_and_remedy(rank, changes, kind, told):
    facts = with_change(rank, **changes)
    (finding,) = judge(facts, "runs")
    assert finding.kind == kind and "node1 (machine 1): " in str(finding) and told in str(finding), str(finding)
    assert describe(facts, [finding], "runs").endswith("a run would fail" if kind == "error" else "a run can start")


def test_machines_with_other_numbers_of_processes_are_told():
    (finding,) = judge(machines()[:-1], "runs")
    assert "node2 (machine 2): 1 processes, node0 (machine 0) has 2: start as many on each" in str(finding)


def test_speeds_of_processors_are_only_compared():
    facts = [replace(one, gpu=None, speeds={"within": 0.2, "between": 0.1}) for one in machines()]
    assert judge(facts, "runs") == []


def look_from_two_machines(rank, folders, hangs):
    """Facts as JSON; two processes play one machine, and each machine has its own idea of the folder."""
    os.environ["GROUP_RANK"] = str(rank // 2)
    measure.examine = lambda folder: None
    measure.diagnose = lambda machine: type("Diagnosis", (), {"errors": [], "warnings": ["/dev/shm has little"]})
    measure.VISIBLE = 0.5
    if hangs:
        measure.PATIENCE = 2.0
    if hangs and rank < 2:
        measure._within_time = lambda measure: None
    facts, hung = measure.look(folders[rank // 2])
    return facts, hung


def test_four_processes_on_two_machines(tmp_path):
    results = run_distributed(look_from_two_machines, 4, [str(tmp_path / "runs")] * 2, False)
    facts = results[0][0]
    assert all(found == facts and not hung for found, hung in results), "all know all"
    assert [one.node for one in facts] == [0, 0, 1, 1] and [one.rank for one in facts] == [0, 1, 2, 3]
    assert [sorted(one.speeds) for one in facts] == [["between", "within"], ["within"]] * 2
    assert all(speed > 0 for one in facts for speed in one.speeds.values())
    assert all(abs(one.clock) < 0.5 and one.disk > 0 and one.folder_problem == "" for one in facts)
    findings = judge(facts, "runs")
    assert [(finding.kind, finding.problem) for finding in findings] == [("warning", "/dev/shm has little")] * 2
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_folder_that_is_not_shared_and_a_link_that_hangs(tmp_path):
    facts, _ = run_distributed(look_from_two_machines, 4, [str(tmp_path / "here"), str(tmp_path / "there")], True)[1]
    findings = [str(finding) for finding in judge(facts, "runs") if finding.kind == "error"]
    assert "there does not show within 0 s what process 0 writes there" in facts[2].folder_problem
    assert any("machine 1): " in told and "does not show" in told for told in findings)
    assert any("machine 0): all-reduce with its GPUs does not end within" in told for told in findings)


def test_srun_alone_is_understood(monkeypatch):
    given = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
    }
    asked = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    hosts = subprocess.CompletedProcess([], 0, stdout="n0\nn1\n")
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: hosts)
    monkeypatch.setattr(program.dist, "init_process_group", lambda *_, **__: asked.update(os.environ))
    program.join()
    joined = {name: asked[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert joined == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "10007"}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_launchers_look_at_their_machines(tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    shared = {"GPUS": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PATH": path}
    shared |= {"SSTOKEN_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["bash", "pretrain_scripts/nodes.sh", "preflight", "--json", "--folder", str(tmp_path)]
    started = [
        subprocess.Popen(
            command,
            cwd=cli.ROOT,
            env=cli.environment() | shared | {"NODE_RANK": number},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    outputs = [one.communicate(timeout=450)[0] for one in started]
    assert [one.returncode for one in started] == [0, 0], outputs
    told = json.loads("".join(outputs))
    assert {one["node"] for one in told["facts"]} == {0, 1}
    assert [finding for finding in told["findings"] if finding["kind"] == "error"] == []
