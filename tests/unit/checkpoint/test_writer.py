"""The helper process of the checkpoint writer ends with its rank, and not before."""

import signal
import subprocess
import sys
import time

import psutil

from tests.helpers import cli

RANK = """
import sys, time, psutil
from megatron_sstoken.checkpoint.writer import prepare_writer
if __name__ == "__main__":
    prepare_writer()
    prepare_writer()
    assert "torch" in sys.modules
    helpers = [child for child in psutil.Process().children() if "multiprocessing.spawn" in " ".join(child.cmdline())]
    print(*(child.pid for child in helpers), flush=True)
    time.sleep(1000)
"""


FORKING = """
import os, time
from megatron_sstoken.checkpoint.lifetime import forks_end_with_this_process
forks_end_with_this_process()
child = os.fork()
if child == 0:
    if os.fork() == 0:
        time.sleep(1000)
    time.sleep(1000)
time.sleep(0.3)
print(child, flush=True)
time.sleep(1000)
"""


def test_what_a_rank_forks_ends_with_it_and_so_does_what_that_forks():
    rank = subprocess.Popen([sys.executable, "-c", FORKING], env=cli.environment(), stdout=subprocess.PIPE, text=True)
    try:
        child = psutil.Process(int(rank.stdout.readline()))
        children = [child, *child.children()]
        assert len(children) == 2
    finally:
        rank.kill()
        rank.wait()
        rank.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_it_outlives_signals_and_not_its_rank(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    rank = subprocess.Popen(
        [sys.executable, "-W", "ignore", program], env=cli.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        (helper,) = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            helper.send_signal(number)
        time.sleep(0.5)
        assert helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE
    finally:
        rank.kill()
        rank.wait()
        rank.stdout.close()
    helper.wait(timeout=20)
    assert not helper.is_running()
