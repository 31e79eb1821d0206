"""One writer at a time, also after one that was killed."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from megatron_sstoken import lock as locks
from megatron_sstoken.lock import Lock


def test_only_one_holds_it(tmp_path):
    path = tmp_path / "new" / "lock"
    with Lock(path) as first:
        assert first.take() is None
        assert Lock(path).take() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(path.parent.iterdir()) == []
    with Lock(path) as second:
        assert second.take() is None
        second.release()
        assert second.take() is None and second._heart.is_alive()


def take_and_die(path):
    assert Lock(path).take() is None
    os._exit(9)


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path, capsys):
    process = multiprocessing.get_context("fork").Process(target=take_and_die, args=(tmp_path / "lock",))
    process.start()
    process.join()
    with Lock(tmp_path / "lock") as lock:
        assert lock.take() is None
        note = capsys.readouterr().err
        assert f"left behind by process {process.pid} on" in note and note.endswith("which has ended: taken over\n")
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def of_another_machine(path, age):
    path.write_text(json.dumps({"host": "node-far-away", "pid": 1, "token": "theirs"}))
    then = time.time() - age
    os.utime(path, (then, then))


def test_a_lock_of_another_machine_is_stale_after_a_minute(tmp_path, capsys):
    path = tmp_path / "lock"
    of_another_machine(path, locks.STALE / 2)
    assert Lock(path).take() == "process 1 on node-far-away"
    of_another_machine(path, locks.STALE + 5)
    with Lock(path) as lock:
        assert lock.take() is None
    assert "left behind by process 1 on node-far-away" in capsys.readouterr().err


def test_a_silent_holder_is_waited_for_and_a_living_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "STALE", 3.0)
    of_another_machine(path, 0)
    with Lock(path) as lock:
        assert lock.take_or_wait() is None
    monkeypatch.setattr(locks, "HEARTBEAT", 0.5)
    monkeypatch.setattr(locks, "STALE", 60.0)
    with Lock(path) as lock:
        assert lock.take() is None
        begun = time.monotonic()
        assert Lock(path).take_or_wait() == f"process {os.getpid()} on {socket.gethostname()}"
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize("content", ["", "nonsense", "[1]", "{}"])
def test_a_damaged_lock_is_held_until_it_is_stale(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content)
    assert Lock(path).take() == "a process that has just started"
    then = time.time() - locks.STALE - 5
    os.utime(path, (then, then))
    with Lock(path) as lock:
        assert lock.take() is None


def take_at(path, number, start, results):
    while time.time() < start:
        pass
    lock = Lock(path)
    results.put((number, lock.take() is None))
    time.sleep(1)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path, stale):
    path = tmp_path / "lock"
    if stale:
        of_another_machine(path, locks.STALE + 5)
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), time.time() + 0.5
    processes = [context.Process(target=take_at, args=(path, number, start, results)) for number in range(6)]
    for process in processes:
        process.start()
    taken = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sum(success for _, success in taken) == 1


@pytest.mark.parametrize("content", ['{"host": "node-far-away", "pid": 1, "token": "theirs"}', "nonsense"])
def test_a_stale_lock_that_another_takes_over_in_the_middle_of_a_look(tmp_path, monkeypatch, content):
    """Its lock must stay where it is all the time: while it was away a third one could make its own."""
    path, others = tmp_path / "lock", Lock(tmp_path / "lock")
    of_another_machine(path, 0)
    path.write_text(content)
    os.utime(path, (then := time.time() - locks.STALE - 5, then))
    look, looks = Lock._look, []

    def look_and_be_late(lock):
        found = look(lock)
        if lock is late and not looks:
            looks.append(found)
            assert others.take() is None
        return found

    monkeypatch.setattr(Lock, "_look", look_and_be_late)
    late = Lock(path)
    with others:
        assert late.take() == f"process {os.getpid()} on {socket.gethostname()}"
        assert looks[0][1] and locks._read(path)["token"] == others._token
        assert [left.name for left in tmp_path.iterdir()] == ["lock"]


def test_only_one_removes_a_stale_lock_and_a_killed_one_is_not_waited_for_long(tmp_path):
    path = tmp_path / "lock"
    of_another_machine(path, locks.STALE + 5)
    removing = tmp_path / "lock.removing"
    removing.touch()
    assert Lock(path).take() == "another process" and path.exists()
    os.utime(removing, (then := time.time() - locks.STALE - 5, then))
    with Lock(path) as lock:
        assert lock.take() is None and not removing.exists()
