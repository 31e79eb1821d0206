"""A job in which nothing moves: who is named, when, and where NCCL's last operations are written."""

import os
import pickle
import threading
import time

import pytest
import torch.distributed as dist

from megatron_sstoken import watchdog
from megatron_sstoken.watchdog import Watchdog


@pytest.fixture
def job(monkeypatch):
    """`job(limit)` watches two processes, both played by this one, whose training threads stand where the test stands."""
    monkeypatch.setattr(watchdog, "_NOTICE", 0.5)
    started = []

    def start(limit: float, places=("works in load", "waits for others in all_reduce")):
        store = dist.HashStore()
        for rank, place in enumerate(places):
            one = Watchdog(limit, store, rank, len(places))
            monkeypatch.setattr(one, "_where", lambda place=place: (place, place.startswith("waits")))
            one._period = 0.2
            one.arrived("step 7")
            started.append(one)
        return started

    yield start
    for one in started:
        one.stop()


def wait_for(capfd, text, seconds=20.0):
    told, until = "", time.monotonic() + seconds
    while text not in told and time.monotonic() < until:
        time.sleep(0.05)
        told += capfd.readouterr().err
    return told


def test_a_process_that_keeps_others_waiting_is_named_before_the_end(job, capfd):
    job(limit=3600)
    told = wait_for(capfd, "all_reduce")
    assert (
        "note: no process got further for " in told and "all end after 60 minutes, training.timeout_minutes):" in told
    )
    first, second = [line.strip() for line in told.splitlines() if line.startswith("  ")][:2]
    assert first == "process 0 is at: step 7, works in load"
    assert second == "process 1 is at: step 7, waits for others in all_reduce"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_without_a_sign_of_life_is_named(job, capfd, silent):
    started = job(limit=3600, places=("waits for others in all_reduce",) * 2)
    time.sleep(1.0)  # it has said where it is
    started[silent].stop()
    told = wait_for(capfd, "no sign of life")
    assert f"process {silent} gives no sign of life, was last at: step 7" in told


def test_long_work_that_all_do_is_no_reason(job, capfd):
    job(limit=3600, places=("works in forward", "works in backward"))
    assert "note" not in wait_for(capfd, "note", seconds=2)


def test_what_has_always_taken_long_is_no_reason(job, capfd):
    for one in job(limit=3600):
        one._longest = 100.0
    assert "note" not in wait_for(capfd, "note", seconds=2)


def test_the_note_comes_less_and_less_often(job, capfd):
    job(limit=3600)
    time.sleep(4.5)
    assert 2 <= capfd.readouterr().err.count("note: no process got further") <= 4


def test_by_default_it_takes_less_than_a_minute():
    assert watchdog._NOTICE + 3 * 5.0 < 60


def test_the_watch_begins_before_the_groups_where_torchrun_keeps_the_store(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    watchdog.start(30)
    assert watchdog._current is None, "the store is not there before process 0 has made it"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    watchdog.start(30)
    try:
        assert watchdog._current is not None
    finally:
        watchdog.stop()
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_the_flight_recorder_is_on_and_its_file_is_the_users_choice(monkeypatch, tmp_path):
    names = [
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
    ]
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    watchdog.prepare_flight_recorder()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].endswith("/flight_recorder_")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(tmp_path / "older_"))
    watchdog.prepare_flight_recorder()
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without NCCL")
def test_the_flight_recorder_is_written_down(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "recorder_"))
    watchdog._write_flight_recorder(3)
    assert "version" in pickle.loads((tmp_path / "recorder_3").read_bytes())
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "nowhere" / "recorder_"))
    watchdog._write_flight_recorder(3)
    assert "No such file or directory: NCCL's last operations are lost" in capfd.readouterr().err
