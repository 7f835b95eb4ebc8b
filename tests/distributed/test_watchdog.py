"""Processes that watch each other: one that dies, stops, hangs or fails is named, and the rest end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time

import accelerate.state  # noqa: F401  # once here, not in every child
import pytest

from peftkit.distributed import watchdog
from peftkit.distributed.watchdog import Watchdog
from peftkit.errors import TrainingError
from tests.faults import runs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A short beat, and little time to end in."""
    monkeypatch.setattr(watchdog, "BEAT", 0.25)
    monkeypatch.setattr(watchdog, "GRACE", 0.5)


@pytest.fixture
def limits(monkeypatch):
    """Sets limits of the watchdog by name."""

    def set_limits(**seconds):
        for name, value in seconds.items():
            monkeypatch.setattr(watchdog, name, value)

    return set_limits


def two(tmp_path, behaviour):
    """Two forked processes under watch; what each behaves like, their exit codes and words, and the seconds it took."""
    said, place = tmp_path / "said.txt", tmp_path / "place.json"

    def agree_for(rank):
        def broadcast_object(value):
            if rank == 0:
                staged = tmp_path / "staged.json"
                staged.write_text(json.dumps(value))
                staged.rename(place)
                return value
            while not place.exists():
                time.sleep(0.01)
            return json.loads(place.read_text())

        return broadcast_object

    def work(rank):
        with Watchdog(rank, 2, agree_for(rank)) as mine:
            behaviour(rank, mine)

    started = time.monotonic()
    children = runs.fork_ranks(work, said)
    codes = runs.wait_all(children, limit=30)
    return codes, said.read_text(), time.monotonic() - started


def test_two_that_end_in_peace_are_let_go(tmp_path):
    codes, said, _ = two(tmp_path, lambda rank, mine: time.sleep(1.5 * rank))
    assert codes == [0, 0]
    assert said == ""


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_killed_is_named_at_once(tmp_path, lost):
    def behaviour(rank, mine):
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)

    codes, said, seconds = two(tmp_path, behaviour)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert f"rank {lost} (process" in said
    assert "ended without an error message" in said
    assert seconds < 15


def test_one_that_is_stopped_is_named_and_killed(tmp_path, limits):
    limits(SILENCE=1.5)

    def behaviour(rank, mine):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(25)

    codes, said, _ = two(tmp_path, behaviour)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1" in said
    assert "sent no heartbeat for 2 s" in said


def passes(mine, count):
    """Quick passes, forward and backward."""
    for _ in range(count):
        mine.arm()
        mine.report_progress()
        mine.report_progress()
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["first", "later", "after a checkpoint"])
@pytest.mark.parametrize("how", ["sleeps", "spins"])
def test_one_that_hangs_is_told_from_those_that_wait_for_it(tmp_path, limits, how, when):
    """Asleep it is told by its sleep, and spinning by its passes, of which the first give no measure."""
    limits(STALL=1.5, IDLE_IN_TRAINING=1.5, FIRST=1.5 if how == "spins" else 600.0)

    def behaviour(rank, mine):
        with mine.training():
            passes(mine, 0 if when == "first" else 5)
            if when == "after a checkpoint":
                mine.disarm()
            if rank == 0:
                mine.arm()
                mine.report_progress()
            while rank == 1 and how == "spins":
                pass
            time.sleep(25)

    codes, said, _ = two(tmp_path, behaviour)
    assert 0 not in codes
    assert -1000 not in codes
    assert "rank 1" in said
    assert "hangs at test_watchdog.py" in said, "where it stands is told"


def test_a_long_rest_is_no_hang_while_somebody_works(tmp_path, limits):
    """A checkpoint or an export that takes longer than any pass: the others sleep, and wait for it."""
    limits(STALL=1.0, IDLE_IN_TRAINING=1.0)

    def behaviour(rank, mine):
        with mine.training():
            passes(mine, 5)
            mine.disarm()
            end = time.monotonic() + 3
            while rank == 0 and time.monotonic() < end:
                pass
            time.sleep(max(0.0, end - time.monotonic()))

    codes, said, _ = two(tmp_path, behaviour)
    assert codes == [0, 0]
    assert said == ""


def test_nobody_hangs_before_training(tmp_path, limits):
    limits(STALL=1.0, IDLE_IN_TRAINING=1.0)
    codes, said, _ = two(tmp_path, lambda rank, mine: time.sleep(3))
    assert codes == [0, 0]
    assert said == ""


def test_a_job_that_is_stopped_as_a_whole_and_continued_goes_on(tmp_path, limits):
    limits(SILENCE=3.0, STALL=3.0, IDLE_IN_TRAINING=3.0)

    def behaviour(rank, mine):
        with mine.training():
            (tmp_path / f"pid-{rank}").write_text(str(os.getpid()))
            passes(mine, 100)
            time.sleep(1.5)

    def pause():
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.05)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for file in files:
                os.kill(int(file.read_text()), number)
            time.sleep(5 if number == signal.SIGSTOP else 0)

    watcher = threading.Thread(target=pause)
    watcher.start()
    codes, said, seconds = two(tmp_path, behaviour)
    watcher.join()
    assert codes == [0, 0]
    assert said == ""
    assert seconds > 5


def test_one_that_fails_is_heard_by_the_others(tmp_path, limits):
    limits(LOST_SECONDS=15.0)

    def behaviour(rank, mine):
        if rank == 1:
            sys.exit(5)
        print("lost:", mine.lost(), flush=True)

    codes, said, _ = two(tmp_path, behaviour)
    assert codes == [0, 5]
    assert "lost: rank 1" in said
    assert "failed: SystemExit: 5" in said


def test_a_stranger_is_not_let_in(monkeypatch):
    monkeypatch.setattr(watchdog, "CONNECT_SECONDS", 2.0)

    def broadcast_object(value):
        strangers.append(socket.create_connection(value[:2]))
        strangers[0].sendall(json.dumps({"token": "guess", "rank": 1, "host": "x", "pid": 1}).encode() + b"\n")
        return value

    strangers = []
    with pytest.raises(TrainingError, match=r"rank \[1\] did not connect to rank 0"):
        Watchdog(0, 2, broadcast_object).__enter__()
    assert strangers[0].recv(10) == b"", "its connection is closed"
    strangers[0].close()


def test_one_process_needs_no_watch():
    before = threading.active_count()
    with Watchdog(0, 1, lambda value: value) as mine:
        mine.report_progress()
        assert threading.active_count() == before
        assert mine.lost() == ""
