"""Processes of one run watch each other, so that one that dies or hangs ends the job within a minute, by name.

Every process sends the main one a line a second over a socket of their own, and gets one back:

    {"marks": 17, "passing": true, "since": 0.4, "still": 0.0, "quiet": 45.0, "place": "step.py:158 in run", …}
    {"bye": true}  {"failed": "…"}    it is done, or its work failed
    {"lost": 3, "why": "…"}           from the main process: all must end

A thread of each process does this, whatever the main thread waits for: collectives (gloo, NCCL) would notice a process
that was stopped only after their own time limit, ten minutes or more. A connection that breaks is a process that died;
one that falls silent, a process that was stopped. A process hangs

* when none of the whole job has done anything for the time allowed: all of them sleep, waiting for each other or for
  something that does not come (``activity``); or
* when passes are under way and no process has got on with its own, while they are busy: one of them loops.

Named is the one that has done least.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftkit.distributed.activity import Activity, whereabouts
from peftkit.errors import TrainingError

BEAT = 1.0
SILENCE = 25.0
"""Seconds without a line after which a process counts as stopped."""
STALL, SLOWER = 45.0, 10.0
"""Passes take this many seconds at least, and this many times the longest so far, before they count as hanging."""
FIRST = 600.0
"""The same for the first passes, which compile, allocate and read."""
QUIET, OUTSIDE = 30.0, 900.0
"""Seconds that all may do nothing in training, and before and after it, where they may wait for another job's cache."""
GRACE = 4.0
"""Seconds that the main thread has to end in its own way before the process is ended."""
HELLO_SECONDS = 45.0
MAX_LINE = 4096
UNWOKEN = 5
"""Beats: a watch that was not woken for so long was stopped with its process, or the machine was."""


@dataclass
class Heartbeat:
    """How far a process has come, as it says in every line."""

    marks: int = 0
    """Passes begun, done forward and done backward, so far."""
    passing: bool = False
    """Whether passes follow each other now; else anything may take its time: a checkpoint, an export."""
    since: float = 0.0
    """Seconds since the last mark."""
    still: float = 0.0
    """Seconds since it last did anything at all."""
    quiet: float = OUTSIDE
    """How many of these are allowed where it stands."""
    place: str = "?"
    waits: bool = False
    """Whether its main thread waits for other processes."""


@dataclass
class Peer:
    """Another process, as seen from here."""

    rank: int
    connection: socket.socket
    host: str = "?"
    pid: int = 0
    heard: float = field(default_factory=time.monotonic)
    pulse: Heartbeat = field(default_factory=Heartbeat)
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


class Watchdog:
    """Watches the other processes of a run from a thread; does nothing in a run of one process.

    Args:
        rank, world_size: this process, and how many there are.
        agree: gives every process the main process's value.
        address: of the main process; the loopback where all run on one machine.
        silence, stall, first: limits in seconds; None takes SILENCE, STALL and FIRST.
        outside: seconds that all may do nothing where no training is under way.
        then: what a user is to do after a process was lost.
        end: ends this process; replaced in tests.
    """

    def __init__(
        self, rank: int, world_size: int, agree: Callable[[Any], Any], *, address: str = "127.0.0.1",
        silence: float | None = None, stall: float | None = None, first: float | None = None,
        outside: float = OUTSIDE, then: str = "Go on from its last checkpoint with --resume",
        end: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.rank, self.world_size = rank, world_size
        self._agree, self._address, self._end = agree, address, end
        self._silence = SILENCE if silence is None else silence
        self._stall = STALL if stall is None else stall
        self._first = FIRST if first is None else first
        self._members: dict[int, Peer] = {}
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._why = ""
        self._marks, self._marked, self._longest = 0, time.monotonic(), 0.0
        self._outside, self._then = outside, then
        self._passing, self._quiet = False, outside
        self._activity = Activity()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
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

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While steps, validations and checkpoints follow each other, less patience is needed than before and after."""
        self._quiet = min(QUIET, self._stall)
        try:
            yield
        finally:
            self.rest()
            self._quiet = self._outside

    def begin(self) -> None:
        """Says that passes follow from here on."""
        if not self._passing:
            self._count()
            self._passing = True

    def mark(self) -> None:
        """Says that this process gets on: half a pass or a step is done."""
        if self._passing and self._marks > 6:  # the first passes are no measure
            self._longest = max(self._longest, time.monotonic() - self._marked)
        self._count()
        self._passing = True

    def rest(self) -> None:
        """Says that what follows may take any time: a checkpoint, an export."""
        self._passing = False
        self._marked = time.monotonic()

    def _count(self) -> None:
        self._marks, self._marked = self._marks + 1, time.monotonic()

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
        self._members[rank] = Peer(rank, connection, host, pid, received=received)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        woken = time.monotonic()
        while not self._closing.wait(BEAT):
            slept, woken = time.monotonic() - woken - BEAT, time.monotonic()
            if slept > UNWOKEN * BEAT:
                self._forgive(slept)
            pulse = self._pulse()
            for member in self._members.values():
                member.send(asdict(pulse))
            found = self._listen() or (self._hanging(pulse) if self.rank == 0 else None)
            if found:
                self._conclude(*found)
                return

    def _forgive(self, seconds: float) -> None:
        """After a time in which this process was stopped, or the machine slept: the others may have been, too."""
        self._marked += seconds
        self._activity.forgive(seconds)
        for member in self._members.values():
            member.heard += seconds

    def _pulse(self) -> Heartbeat:
        place, waits = whereabouts()
        since = time.monotonic() - self._marked
        return Heartbeat(self._marks, self._passing, since, self._activity.look(), self._quiet, place, waits)

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
                    member.pulse = member.pulse if member.done else Heartbeat(**message)
            except (EOFError, ValueError, TypeError):
                if not member.done:
                    return member.rank, "ended without a word: it was killed, or ran out of memory"
            if not member.done and time.monotonic() - member.heard > self._silence:
                return member.rank, f"has not been heard of for {self._silence:.0f} s: it was stopped, or cut off"
        return None

    def _hanging(self, mine: Heartbeat) -> tuple[int, str] | None:
        """The process that has done least, when nobody gets on; a process by itself is not judged."""
        pulses = {0: mine} | {rank: member.pulse for rank, member in self._members.items() if not member.done}
        limit = max(self._stall, SLOWER * self._longest) if self._longest else self._first
        everyone = pulses.values()
        asleep = all(pulse.still >= pulse.quiet for pulse in everyone)
        stuck = any(pulse.passing for pulse in everyone) and all(pulse.since >= limit for pulse in everyone)
        if len(pulses) < 2 or not (asleep or stuck):
            return None
        rank, least = min(pulses.items(), key=lambda item: (item[1].marks, item[1].waits, item[0]))
        how = f"has done anything for {min(pulse.still for pulse in everyone):.0f} s" if asleep else (
            f"has got on for {limit:.0f} s"
        )  # fmt: skip
        return rank, f"hangs at {least.place}: no process {how}, and this one has done least"

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
            print(f"peftkit: {self._why}; the job ends. {self._then}", file=sys.stderr)
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
