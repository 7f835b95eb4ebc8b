"""Processes of one run watch each other, so that one that dies or hangs ends the job within a minute, by name.

Every process sends the main one a line a second over a socket of their own, and gets one back:

    {"marks": 17, "idle": 0.4}        steps and passes done, seconds since the last; idle is null outside the loop
    {"bye": true}  {"failed": "…"}    it is done, or its work failed
    {"lost": 3, "why": "…"}           from the main process: all must end

Collectives (gloo, NCCL) would notice a process that was stopped only after their own time limit, ten minutes or more.
A connection that breaks is a process that died; one that falls silent, a process that was stopped; and when nobody in
the whole job gets on, the process that has done least is the one that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import TrainingError

BEAT = 1.0
SILENCE = 25.0
"""Seconds without a line after which a process counts as stopped."""
STALL, SLOWER = 45.0, 10.0
"""Nobody got on for this many seconds, and for this many times the longest pause between two marks so far."""
GRACE = 4.0
"""Seconds that the main thread has to end in its own way before the process is ended."""
HELLO_SECONDS = 60.0
MAX_LINE = 4096


@dataclass
class Member:
    """Another process, as seen from here."""

    rank: int
    connection: socket.socket
    host: str = "?"
    pid: int = 0
    heard: float = field(default_factory=time.monotonic)
    marks: int = 0
    idle: float | None = None
    done: bool = False
    received: bytes = b""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Messages that have come; raises EOFError after the last, when the other end has gone."""
        gone = False
        while not gone:
            try:
                piece = self.connection.recv(65536)
            except (BlockingIOError, TimeoutError):
                break
            except OSError:
                piece = b""
            gone = not piece
            self.received += piece
            self.heard = time.monotonic()
        *whole, self.received = self.received.split(b"\n")
        for line in whole:
            yield json.loads(line)
        if gone:
            raise EOFError

    def send(self, message: dict[str, Any]) -> None:
        """Sends a line; a process that does not read any more is noticed by its silence."""
        with contextlib.suppress(OSError):
            self.connection.sendall((json.dumps(message) + "\n").encode())


class Watch:
    """Watches the other processes of a run from a thread; does nothing in a run of one process.

    Args:
        rank, world_size: this process, and how many there are.
        agree: gives every process the main process's value.
        address: of the main process; the loopback where all run on one machine.
        silence, stall: limits in seconds; None takes SILENCE and STALL.
        end: ends this process; replaced in tests.
    """

    def __init__(
        self, rank: int, world_size: int, agree: Callable[[Any], Any], *, address: str = "127.0.0.1",
        silence: float | None = None, stall: float | None = None, end: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.rank, self.world_size = rank, world_size
        self._agree, self._address, self._end = agree, address, end
        self._silence = SILENCE if silence is None else silence
        self._stall = STALL if stall is None else stall
        self._members: dict[int, Member] = {}
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._why = ""
        self._marks, self._marked, self._longest = 0, None, 0.0  # type: int, float | None, float
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            server = socket.create_server((self._address, 0), backlog=self.world_size) if self.rank == 0 else None
            here = (_host(), os.getpid())
            place = (self._address, server.getsockname()[1], secrets.token_hex(16), here) if server else None
            host, port, word, main = self._agree(place)
            if server:
                with server:
                    self._welcome(server, word)
            else:
                self._join(host, port, word, main)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        failed = error is not None and not self._lost.is_set()
        message = {"failed": f"{type(error).__name__}: {error}"[:500]} if failed else {"bye": True}
        self._closing.set()
        if self._thread:
            self._thread.join(2 * BEAT)
        for member in self._members.values():
            member.send(message)
            member.connection.close()

    def mark(self) -> None:
        """Says that this process gets on: a pass or a step is done."""
        now = time.monotonic()
        if self._marked is not None and self._marks > 2:  # the first passes are no measure
            self._longest = max(self._longest, now - self._marked)
        self._marks, self._marked = self._marks + 1, now

    def rest(self) -> None:
        """Says that what follows may take any time: a checkpoint, an export."""
        self._marked = None

    def lost(self, wait: float = 0.0) -> str:
        """Which process was lost and why; empty when none was."""
        self._lost.wait(wait if self._thread else 0.0)
        return self._why

    # -- meeting -----------------------------------------------------------------------------------------------------

    def _welcome(self, server: socket.socket, word: str) -> None:
        """Takes in every other process that knows the word."""
        deadline = time.monotonic() + HELLO_SECONDS
        while len(self._members) < self.world_size - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self.world_size)) - set(self._members))
                raise TrainingError(f"rank {missing} did not reach rank 0 in {HELLO_SECONDS:.0f} s") from None
            connection.settimeout(5)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                line, _, rest = connection.recv(MAX_LINE).partition(b"\n")
                hello = json.loads(line)
                if secrets.compare_digest(str(hello["word"]), word) and 0 < int(hello["rank"]) < self.world_size:
                    self._add(int(hello["rank"]), connection, str(hello["host"]), int(hello["pid"]), rest)
                    continue
            connection.close()

    def _join(self, host: str, port: int, word: str, main: tuple[str, int]) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=HELLO_SECONDS)
        except OSError as error:
            raise TrainingError(f"rank {self.rank} does not reach rank 0 at {host}: {error}") from None
        hello = {"word": word, "rank": self.rank, "host": _host(), "pid": os.getpid()}
        connection.sendall((json.dumps(hello) + "\n").encode())
        self._add(0, connection, *main)

    def _add(self, rank: int, connection: socket.socket, host: str, pid: int, received: bytes = b"") -> None:
        connection.settimeout(0.0)
        self._members[rank] = Member(rank, connection, host, pid, received=received)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(BEAT):
            idle = None if self._marked is None else time.monotonic() - self._marked
            for member in self._members.values():
                member.send({"marks": self._marks, "idle": idle})
            found = self._listen() or (self._hanging(idle) if self.rank == 0 else None)
            if found:
                self._conclude(*found)
                return

    def _listen(self) -> tuple[int, str] | None:
        """The rank that was lost, and how that shows."""
        for member in self._members.values():
            try:
                for message in member.lines():
                    if "lost" in message:
                        return int(message["lost"]), str(message["why"])
                    if "failed" in message:
                        return member.rank, f"failed: {message['failed']}"
                    member.done = member.done or "bye" in message
                    member.marks, member.idle = message.get("marks", member.marks), message.get("idle")
            except (EOFError, ValueError):
                if not member.done:
                    return member.rank, "ended without a word: it was killed, or ran out of memory"
            if not member.done and time.monotonic() - member.heard > self._silence:
                return member.rank, f"has not been heard of for {self._silence:.0f} s: it was stopped, or cut off"
        return None

    def _hanging(self, idle: float | None) -> tuple[int, str] | None:
        """The process that has done least, when nobody gets on."""
        limit = max(self._stall, SLOWER * self._longest)
        idles = [idle, *(member.idle for member in self._members.values() if not member.done)]
        if not self._longest or any(value is None or value < limit for value in idles):
            return None
        least = min([(self._marks, 0), *((member.marks, member.rank) for member in self._members.values())])
        return least[1], f"hangs: no process has got on for {limit:.0f} s, and this one has done least"

    def _conclude(self, rank: int, why: str) -> None:
        where = self._members.get(rank)
        place = f" (process {where.pid} on {where.host.partition('/')[0]})" if where and where.pid else ""
        self._why = f"rank {rank}{place} {why}"
        for member in self._members.values():
            member.send({"lost": rank, "why": why})
        self._lost.set()
        silent = "failed" not in why
        if silent and where and where.pid and where.host == _host():
            with contextlib.suppress(OSError):
                os.kill(
                    where.pid, signal.SIGKILL
                )  # a stopped process hears nothing else, and its launcher waits for it
        if self._closing.wait(GRACE):
            return
        if self.rank == min(set(range(self.world_size)) - {rank}):
            print(f"peftkit: {self._why}; the job ends. Go on from its last checkpoint with --resume", file=sys.stderr)
            sys.stderr.flush()
        self._end(1)


def address(world_size: int, local_world_size: int) -> str:
    """Where the main process listens: the loopback, unless there are several machines."""
    return "127.0.0.1" if local_world_size >= world_size else os.environ.get("MASTER_ADDR", "127.0.0.1")


def _host() -> str:
    """This machine's name; containers of one name differ by their process namespace."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
