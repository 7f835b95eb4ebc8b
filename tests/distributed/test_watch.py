"""Processes that watch each other: one that dies, stops, hangs or fails is named, and the rest end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time

import pytest

from peftkit.errors import TrainingError
from peftkit.training import watch
from peftkit.training.watch import Watch
from tests.faults import runs


def two(tmp_path, behaviour, **limits):
    """Two forked processes under watch; what each behaves like, their exit codes and words, and the seconds it took."""
    said, place = tmp_path / "said.txt", tmp_path / "place.json"

    def agree_for(rank):
        def agree(value):
            if rank == 0:
                staged = tmp_path / "staged.json"
                staged.write_text(json.dumps(value))
                staged.rename(place)
                return value
            while not place.exists():
                time.sleep(0.01)
            return json.loads(place.read_text())

        return agree

    def work(rank):
        with Watch(rank, 2, agree_for(rank), **limits) as mine:
            behaviour(rank, mine)

    started = time.monotonic()
    children = runs.fork_ranks(work, said)
    codes = runs.wait_all(children, limit=30)
    return codes, said.read_text(), time.monotonic() - started


def test_two_that_end_in_peace_are_let_go(tmp_path):
    codes, said, _ = two(tmp_path, lambda rank, mine: time.sleep(2.5 * rank))
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
    assert "ended without a word" in said
    assert seconds < 15


def test_one_that_is_stopped_is_named_and_killed(tmp_path):
    def behaviour(rank, mine):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(25)

    codes, said, _ = two(tmp_path, behaviour, silence=3.0)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1" in said
    assert "has not been heard of for 3 s" in said


def test_one_that_loops_is_told_from_those_that_wait_for_it(tmp_path):
    def behaviour(rank, mine):
        for _ in range(6 if rank == 0 else 5):
            mine.mark()
            time.sleep(0.05)
        time.sleep(25)

    codes, said, _ = two(tmp_path, behaviour, stall=3.0)
    assert 0 not in codes
    assert -1000 not in codes
    assert "rank 1" in said
    assert "hangs" in said


def test_a_long_rest_is_no_hang(tmp_path):
    def behaviour(rank, mine):
        for _ in range(5):
            mine.mark()
            time.sleep(0.05)
        mine.rest()
        time.sleep(5)

    codes, said, _ = two(tmp_path, behaviour, stall=2.0)
    assert codes == [0, 0]
    assert said == ""


def test_one_that_fails_is_heard_by_the_others(tmp_path):
    def behaviour(rank, mine):
        if rank == 1:
            sys.exit(5)
        print("lost:", mine.lost(wait=15), flush=True)

    codes, said, _ = two(tmp_path, behaviour)
    assert codes == [0, 5]
    assert "lost: rank 1" in said
    assert "failed: SystemExit: 5" in said


def test_a_stranger_is_not_let_in(monkeypatch):
    monkeypatch.setattr(watch, "HELLO_SECONDS", 2.0)

    def agree(value):
        strangers.append(socket.create_connection(value[:2]))
        strangers[0].sendall(json.dumps({"word": "guess", "rank": 1, "host": "x", "pid": 1}).encode() + b"\n")
        return value

    strangers = []
    with pytest.raises(TrainingError, match=r"rank \[1\] did not reach rank 0"):
        Watch(0, 2, agree).__enter__()
    assert strangers[0].recv(10) == b"", "its connection is closed"
    strangers[0].close()


def test_one_process_needs_no_watch():
    before = threading.active_count()
    with Watch(0, 1, lambda value: value) as mine:
        mine.mark()
        assert threading.active_count() == before
        assert mine.lost() == ""
