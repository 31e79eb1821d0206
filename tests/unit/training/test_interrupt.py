"""Signals ask a run to stop; a second Ctrl-C insists; what is ignored stays ignored."""

import os
import signal
import time

import pytest

from megatron_sstoken.training import interrupt
from megatron_sstoken.training.interrupt import StopRequest


@pytest.fixture(autouse=True)
def heard():
    """Signals as in a terminal: whoever runs the tests may ignore some, as nohup does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_insists_and_the_same_one_passed_on_does_not(monkeypatch):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # from the terminal and from torchrun
        assert stop.received == "SIGINT"
        monkeypatch.setattr(interrupt, "_IMPATIENT", 0.01)
        time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # the terminal of a run under nohup is closed
            assert stop.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
