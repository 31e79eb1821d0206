"""The helper process of the checkpoint writer ends with its rank, and not before."""

import signal
import subprocess
import sys
import time

import psutil

from tests.helpers import cli

RANK = """
import time, psutil
from megatron_sstoken.checkpoint.writer import prepare_writer
if __name__ == "__main__":
    prepare_writer()
    prepare_writer()
    helpers = [child for child in psutil.Process().children() if "multiprocessing.spawn" in " ".join(child.cmdline())]
    print(*(child.pid for child in helpers), flush=True)
    time.sleep(1000)
"""


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
