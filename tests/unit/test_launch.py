"""The start of processes: what is tried again, what is said, and the exit code."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from megatron_sstoken import launch
from tests.helpers import cli

PROGRAM = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
print(f"process {rank}, start {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
if how == "mistake":
    if rank == 0:
        print("error: data.train=nowhere does not exist", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # as ours do: the agent ends all as soon as one fails
    sys.exit(2)
if how == "fail once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(1)
if how == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "asked to stop":
    def save(*_):
        print(f"process {rank} has saved", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGUSR1, save)
    print("training", flush=True)
if how in ("killed", "asked to stop"):
    time.sleep(60)
if how == "environment":
    print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("LOGLEVEL"))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def command(program, how, *options):
    launcher = [sys.executable, "-m", "megatron_sstoken.launch", "--standalone", "--nproc-per-node=2"]
    return [*launcher, *options, str(program), how]


def start(program, how, *options):
    return cli.run(command(program, how, *options))


def test_a_mistake_stands_alone_and_is_not_tried_again(program):
    result = start(program, "mistake", "--max-restarts=3")
    assert (result.returncode, result.stderr) == (2, "error: data.train=nowhere does not exist\n")
    assert "start 1" not in result.stdout


def test_what_fails_is_started_again_with_a_note(program):
    result = start(program, "fail once", "--max-restarts=2")
    assert result.returncode == 0 and result.stdout.count("start 1") == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("note: starting the processes of ") and line.endswith(" again: restart 1 of at most 2")


def test_what_fails_for_good_has_the_exit_code_of_the_process(program):
    result = start(program, "fail once")
    assert (result.returncode, result.stderr) == (1, "")


def test_a_killed_process_is_named(program):
    result = start(program, "killed")
    (line,) = result.stderr.splitlines()
    assert (
        result.returncode == 137 and line.startswith("error: process 1 on ") and "was ended by SIGKILL: out of" in line
    )


@pytest.mark.parametrize(
    ("number", "options", "code"),
    [(signal.SIGTERM, [], 143), (signal.SIGUSR1, [], 138), (signal.SIGTERM, ["--stopped-code=0"], 0)],
)
def test_asked_to_stop_it_waits_for_what_the_processes_save(program, number, options, code):
    run = subprocess.Popen(
        command(program, "asked to stop", *options),
        env=cli.environment(), cwd=cli.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = [run.stdout.readline() for _ in range(4)]
    run.send_signal(number)
    output, errors = run.communicate(timeout=60)
    assert sorted(seen)[-1] == "training\n"
    # They write into one pipe: line breaks may come after both.
    assert sorted(re.findall("process . has saved", output)) == ["process 0 has saved", "process 1 has saved"]
    assert (run.returncode, errors) == (code, f"stopped by {number.name}\n")


@pytest.mark.timeout(300)  # on a machine that may be busy
def test_each_process_has_a_log_that_later_starts_append_to(program, tmp_path):
    for _ in range(2):
        result = start(program, "mistake", f"--logs={tmp_path / 'logs'}")
        assert result.returncode == 2 and "process 0, start 0" in result.stdout
        assert "error: data.train=nowhere does not exist" in result.stderr
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert text.count("process 0, start 0") == text.count("error: data.train=nowhere") == text.count("\n== 2") == 2
    assert "process 1" not in text


def test_the_log_is_whole_when_all_are_told_to_stop(program, tmp_path):
    run = subprocess.Popen(
        command(program, "asked to stop", f"--logs={tmp_path}"), env=cli.environment(), cwd=cli.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(4):
        run.stdout.readline()
    time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert [f"process {rank} has saved" in (tmp_path / f"rank_{rank:05}.log").read_text() for rank in (0, 1)] == [
        True
    ] * 2


def test_memory_segments_grow_unless_the_user_says_otherwise(program, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LOGLEVEL"):
        monkeypatch.delenv(name, raising=False)
    assert "expandable_segments:True None None" in start(program, "environment").stdout
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert "None max_split_size_mb:512 None" in start(program, "environment").stdout


@pytest.mark.parametrize(
    ("processes", "given", "threads"), [("2", None, "1"), ("2", "4", "4"), ("1", None, None), ("auto", None, "1")]
)
def test_several_processes_share_the_cores_unless_the_user_says_otherwise(monkeypatch, processes, given, threads):
    environment = {"LOGLEVEL": "INFO"} | ({"OMP_NUM_THREADS": given} if given else {})
    monkeypatch.setattr(launch.os, "environ", environment)
    monkeypatch.setattr(launch.launcher, "LocalElasticAgent", None)
    monkeypatch.setattr(launch.torchrun, "run", lambda options: None)
    assert launch.main(["--standalone", f"--nproc-per-node={processes}", "program.py"]) == 0
    assert environment.get("OMP_NUM_THREADS") == threads


def test_processes_without_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.delenv("SSTOKEN_DEVICE", raising=False)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    assert launch.main(["--standalone", "--nproc-per-node=2", "--need-gpus", "program.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 2 processes want a GPU each, and torch finds 1 on ") and "set GPUS to" in line
    assert launch.gpu_problem(1) is None
    monkeypatch.setenv("SSTOKEN_DEVICE", "cpu")
    assert launch.gpu_problem(2) is None


def test_machines_that_do_not_meet_are_told(program):
    elsewhere = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:9"]
    launcher = [sys.executable, "-m", "megatron_sstoken.launch", *elsewhere, "--rdzv-conf=is_host=false,read_timeout=1"]
    result = cli.run([*launcher, str(program), "mistake"])
    assert (
        result.returncode == 1 and " did not meet the other machines at 127.0.0.1:9 " in result.stderr.splitlines()[-1]
    )
    assert "Traceback" not in result.stderr and os.path.basename(program) not in result.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{}"],
        ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{}", "--rdzv-conf=is_host=true"],
        ["--master-addr=127.0.0.1", "--master-port={}"],
    ],
)
@pytest.mark.parametrize("error", [RendezvousConnectionError, torch.distributed.DistNetworkError])
def test_a_port_in_use_is_said(monkeypatch, capsys, options, error):
    def fail(_):
        raise error("torch's own words")

    monkeypatch.setattr(launch.torchrun, "run", fail)
    monkeypatch.setattr(launch, "_set_environment", lambda: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert launch.main([*(one.format(port) for one in options), "program.py"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: port {port} of ") and "is in use" in told and told.count("\n") == 1


def test_a_port_that_another_machine_listens_on_is_not_looked_at(monkeypatch, capsys):
    def fail(_):
        raise RendezvousConnectionError("no route")

    monkeypatch.setattr(launch.torchrun, "run", fail)
    monkeypatch.setattr(launch, "_set_environment", lambda: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"node0:{other.getsockname()[1]}"
        options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-conf=is_host=false"]
        assert launch.main([*options, "program.py"]) == 1
    assert "did not meet the other machines at node0:" in capsys.readouterr().err
