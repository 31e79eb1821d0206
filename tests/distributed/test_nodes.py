"""Two "nodes" on one machine: two torchrun agents that meet through a rendezvous, as on two machines; and being stopped."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from tests.helpers import cli
from tests.helpers.distributed_runner import free_port, run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer

NUM_STEPS, SAVE_EVERY, PATIENCE = 12, 4, 100


def make_run(folder, directory, **changes):
    """Settings of a run that saves often, on the model and data in `folder`."""
    return make_settings(
        str(folder / "model"),
        str(folder / "data"),
        training__global_batch_size=4,
        training__steps=NUM_STEPS,
        checkpoint__directory=str(directory),
        checkpoint__save_every=SAVE_EVERY,
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(24, seed=3))
    return folder


def start_nodes(settings) -> list[subprocess.Popen]:
    """Two agents of two processes, started as users start them on two machines; output is captured."""
    shared = {"GPUS": "2", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {
        "SSTOKEN_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    command = ["bash", "pretrain_scripts/nodes.sh", "quickstart", *cli.settings_arguments(settings)]
    return [
        subprocess.Popen(
            command,
            env=cli.environment() | shared | {"NODE_RANK": str(number)},
            cwd=cli.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def finish(nodes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and output of each agent; none may hang."""
    try:
        return [(node.wait(PATIENCE), output) for node in nodes for output in [node.communicate(timeout=PATIENCE)[0]]]
    finally:
        for node in nodes:
            node.kill()


def wait_for_step(directory, step: int, nodes: list[subprocess.Popen]) -> None:
    """Return once a checkpoint of at least `step` is complete."""
    deadline = time.monotonic() + PATIENCE
    while max(checkpoint_steps(directory), default=0) < step:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), "nodes should be training"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_node_ends_the_other_and_a_restart_equals_one_agent(folder, tmp_path):
    directory = tmp_path / "nodes"
    settings = make_run(folder, directory, parallel__tensor=2)
    nodes = start_nodes(settings)
    wait_for_step(directory, SAVE_EVERY, nodes)
    for process in [*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]]:
        process.kill()  # as when the machine is gone: no agent is left to tell the other
    since = time.monotonic()
    (code, output), _ = finish(nodes)
    assert code != 0 and time.monotonic() - since < PATIENCE / 2
    assert re.search(r"error: process \d lost the connection to another one", output), output[-3000:]
    assert "start the same command on all nodes again" in output
    assert max(checkpoint_steps(directory)) < NUM_STEPS, "killed too late to show anything"

    for code, output in finish(start_nodes(settings)):
        assert code == 0, output[-3000:]
    alone = make_run(folder, tmp_path / "alone", parallel__tensor=2)
    result = cli.run(cli.launch_command(4, "megatron_sstoken.train", *cli.settings_arguments(alone)))
    assert result.returncode == 0, result.stderr
    found, whole = (cli.scalars(tmp_path / name / "logs", "loss/selected") for name in ("nodes", "alone"))
    assert set(found) == set(range(1, NUM_STEPS + 1))
    assert found == whole


def train_until_signal(rank, settings, at_step, number):
    """On each rank: train, the second rank and its helpers being sent a signal in the middle of a step; the steps done."""
    from megatron_sstoken.training.loop import train

    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
    trainer = make_trainer(settings)
    take = trainer.prefetcher.take

    def take_and_signal(step):
        if rank == 1 and step == at_step:
            for process in (*psutil.Process().children(recursive=True), psutil.Process()):
                process.send_signal(number)  # as torchrun and Slurm do
        return take(step)

    trainer.prefetcher.take = take_and_signal
    train(trainer)
    return trainer.step, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_one_process_ends_all_after_the_same_step_with_a_checkpoint(folder, tmp_path, number):
    results = run_distributed(train_until_signal, 2, make_run(folder, tmp_path / "run"), SAVE_EVERY + 1, number)
    assert results == [(SAVE_EVERY + 2, True)] * 2
    assert max(checkpoint_steps(tmp_path / "run")) == SAVE_EVERY + 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_stands_still_ends_the_run(folder, tmp_path):
    """The others wait for it as long as the setting says; torchrun then ends it, too."""
    settings = make_run(folder, tmp_path / "run", parallel__tensor=2, training__timeout_minutes=0.2)
    settings.training.steps = 2000
    command = cli.launch_command(2, "megatron_sstoken.train", *cli.settings_arguments(settings))
    run = subprocess.Popen(
        command, env=cli.environment(), cwd=cli.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(tmp_path / "run", SAVE_EVERY, [run])
        ranks = [
            one for one in psutil.Process(run.pid).children() if "megatron_sstoken.train" in " ".join(one.cmdline())
        ]
        ranks[1].suspend()
        since = time.monotonic()
        output, _ = run.communicate(timeout=PATIENCE)
        assert run.returncode != 0 and time.monotonic() - since < PATIENCE
        assert "lost the connection to another one" in output, output[-3000:]
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ranks)
    finally:
        run.kill()
