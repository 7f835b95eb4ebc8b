"""A watchdog for the processes of a job: if one dies or hangs, it is named and the job ends within a minute.

Once a second every process sends the main one a line over a socket of their own, and gets one back:

    {"progress": 17, "armed": true, "since_progress": 0.4, "idle": 0.0, "location": "step.py:158 in run", …}
    {"done": true}  {"failed": "…"}   it has finished, or its work failed
    {"lost": 3, "reason": "…"}        from the main process: all must end

A thread of each process does this: collectives (gloo, NCCL) would notice a stopped process only after their own timeout
of ten minutes or more. A process whose connection breaks has died; one that falls silent was stopped. One hangs if the
whole job has been idle for the time allowed (``activity``), or if passes (forward and backward) are under way and no
process makes progress, although they are busy. The process that made the least progress is named.
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

from peftkit.distributed.activity import Activity, main_thread_location
from peftkit.errors import TrainingError

BEAT = 1.0  # seconds between heartbeats
SILENCE = 25.0
"""Seconds without a heartbeat after which a process counts as stopped."""
STALL, SLOWER = 45.0, 10.0
"""Passes hang if they take at least this many seconds, and this many times the longest so far."""
FIRST = 600.0
"""Seconds allowed for the first passes, which compile, allocate and read."""
IDLE_IN_TRAINING, IDLE_OUTSIDE = 30.0, 900.0
"""Seconds for which all may be idle: in training, and before and after it, where they may wait for a cache's lock."""
GRACE = 4.0
"""Seconds that the main thread has to end in its own way before the process is ended."""
LOST_SECONDS = 5.0
"""Seconds in which the lost process is named after a collective failed."""
CONNECT_SECONDS = 45.0
MAX_LINE = 4096
MISSED_BEATS = 5
"""A watchdog that was delayed by this many beats was suspended with its process or machine."""


@dataclass
class Heartbeat:
    """The state of a process, sent at every beat."""

    progress: int = 0
    """Forward and backward passes so far."""
    armed: bool = False
    """Whether passes follow each other now; otherwise any time is allowed, as for a checkpoint or an export."""
    since_progress: float = 0.0
    """Seconds."""
    idle: float = 0.0
    """Seconds since it last did anything at all."""
    idle_limit: float = IDLE_OUTSIDE
    location: str = "?"
    """File, line and function of the main thread."""
    waiting: bool = False
    """Whether the main thread waits for other processes."""


@dataclass
class Peer:
    """Another process and the connection to it."""

    rank: int
    connection: socket.socket
    host: str
    pid: int
    received: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    done: bool = False

    def __post_init__(self) -> None:
        self.connection.settimeout(0.0)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields the messages received; raises EOFError after the last one if the connection was closed."""
        closed = False
        while not closed:
            try:
                data = self.connection.recv(65536)
            except (BlockingIOError, TimeoutError):
                break
            except OSError:
                data = b""
            closed = not data
            self.received += data
            self.heard = time.monotonic()
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            yield json.loads(line)
        if closed:
            raise EOFError

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; a process that no longer reads is noticed by its silence."""
        with contextlib.suppress(OSError):
            self.connection.sendall((json.dumps(message) + "\n").encode())


class Watchdog:
    """Watches the other processes of a job from a thread; does nothing in a job of one process.

    Args:
        broadcast: returns the main process's value on every process.
        address: of the main process.
        idle_limit: seconds for which all may be idle outside of training.
        advice: what a user should do after a process was lost.
    """

    def __init__(
        self, rank: int, world_size: int, broadcast: Callable[[Any], Any], *, address: str = "127.0.0.1",
        idle_limit: float = IDLE_OUTSIDE, advice: str = "Resume from its last checkpoint with --resume",
    ) -> None:  # fmt: skip
        self.rank, self.world_size = rank, world_size
        self._broadcast, self._address, self._advice = broadcast, address, advice
        self._peers: dict[int, Peer] = {}
        self._closing, self._lost, self._reason = threading.Event(), threading.Event(), ""
        self._armed, self._progress, self._progress_time, self._longest = False, 0, time.monotonic(), 0.0
        self._idle_outside = self._idle_limit = idle_limit
        self._activity = Activity()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.world_size > 1:
            server = socket.create_server((self._address, 0), backlog=self.world_size) if self.rank == 0 else None
            process = (_host(), os.getpid())
            main = (self._address, server.getsockname()[1], secrets.token_hex(16), process) if server else None
            address, port, token, main_process = self._broadcast(main)
            if server:
                with server:
                    self._accept_peers(server, token)
            else:
                self._connect(address, port, token, main_process)
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        failed = error is not None and not self._lost.is_set()
        message = {"failed": f"{type(error).__name__}: {error}"[:500]} if failed else {"done": True}
        self._closing.set()
        if self._thread:
            self._thread.join(2 * BEAT)
        for peer in self._peers.values():
            peer.send(message)
            peer.connection.close()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Lowers the idle limit while steps, validations and checkpoints follow each other."""
        self._idle_limit = IDLE_IN_TRAINING
        try:
            yield
        finally:
            self.disarm()
            self._idle_limit = self._idle_outside

    def arm(self) -> None:
        """Expects progress from here on: passes follow each other."""
        if not self._armed:
            self.report_progress()

    def report_progress(self) -> None:
        """Reports that a forward or a backward pass is done."""
        if self._armed and self._progress > 6:  # the first passes are not representative
            self._longest = max(self._longest, time.monotonic() - self._progress_time)
        self._armed, self._progress, self._progress_time = True, self._progress + 1, time.monotonic()

    def disarm(self) -> None:
        """Expects no progress until the next pass: what follows, such as a checkpoint, may take any time."""
        self._armed = False
        self._progress_time = time.monotonic()

    def lost(self) -> str:
        """Which process was lost and why; empty if none was, or the watchdog does not find out in LOST_SECONDS."""
        if self._thread:
            self._lost.wait(LOST_SECONDS)
        return self._reason

    def _accept_peers(self, server: socket.socket, token: str) -> None:
        """Accepts a connection from every other process that knows the token."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(self._peers) < self.world_size - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self.world_size)) - set(self._peers))
                raise TrainingError(
                    f"rank {missing} did not connect to rank 0 at {self._address} in {CONNECT_SECONDS:.0f} s: check "
                    "that the processes have started and can reach this address"
                ) from None
            connection.settimeout(5)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                line, _, rest = connection.recv(MAX_LINE).partition(b"\n")
                hello = json.loads(line)
                if secrets.compare_digest(str(hello["token"]), token) and 0 < int(hello["rank"]) < self.world_size:
                    rank, host, pid = int(hello["rank"]), str(hello["host"]), int(hello["pid"])
                    self._peers[rank] = Peer(rank, connection, host, pid, rest)
                    continue
            connection.close()

    def _connect(self, address: str, port: int, token: str, main_process: tuple[str, int]) -> None:
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            raise TrainingError(f"rank {self.rank} cannot connect to rank 0 at {address}: {error}") from None
        hello = {"token": token, "rank": self.rank, "host": _host(), "pid": os.getpid()}
        connection.sendall((json.dumps(hello) + "\n").encode())
        self._peers[0] = Peer(0, connection, *main_process)

    def _run(self) -> None:
        woken = time.monotonic()
        while not self._closing.wait(BEAT):
            delay, woken = time.monotonic() - woken - BEAT, time.monotonic()
            if delay > MISSED_BEATS * BEAT:
                self._discount(delay)
            heartbeat = self._heartbeat()
            for peer in self._peers.values():
                peer.send(asdict(heartbeat))
            lost = self._receive() or (self._hanging(heartbeat) if self.rank == 0 else None)
            if lost:
                self._end_job(*lost)
                return

    def _discount(self, seconds: float) -> None:
        """Takes off a time for which this process or its machine was suspended: the others may have been, too."""
        self._progress_time += seconds
        self._activity.discount(seconds)
        for peer in self._peers.values():
            peer.heard += seconds

    def _heartbeat(self) -> Heartbeat:
        location, waiting = main_thread_location()
        since, idle = time.monotonic() - self._progress_time, self._activity.idle_seconds()
        return Heartbeat(self._progress, self._armed, since, idle, self._idle_limit, location, waiting)

    def _receive(self) -> tuple[int, str] | None:
        """The rank that was lost and the reason."""
        for peer in self._peers.values():
            try:
                for message in peer.messages():
                    if "lost" in message:
                        return int(message["lost"]), str(message["reason"])
                    if "failed" in message:
                        return peer.rank, f"failed: {message['failed']}"
                    peer.done = peer.done or "done" in message
                    peer.heartbeat = peer.heartbeat if peer.done else Heartbeat(**message)
            except (EOFError, ValueError, TypeError):
                if not peer.done:
                    return peer.rank, "ended without an error message: it was killed, or ran out of memory"
            if not peer.done and time.monotonic() - peer.heard > SILENCE:
                return peer.rank, f"sent no heartbeat for {SILENCE:.0f} s: it was stopped, or disconnected"
        return None

    def _hanging(self, own: Heartbeat) -> tuple[int, str] | None:
        """The process that made the least progress if the job hangs; a process on its own is not judged."""
        by_rank = {0: own} | {rank: peer.heartbeat for rank, peer in self._peers.items() if not peer.done}
        beats = by_rank.values()
        limit = max(STALL, SLOWER * self._longest) if self._longest else FIRST
        asleep = all(beat.idle >= beat.idle_limit for beat in beats)
        stuck = any(beat.armed for beat in beats) and all(beat.since_progress >= limit for beat in beats)
        if len(beats) < 2 or not (asleep or stuck):
            return None
        rank, least = min(by_rank.items(), key=lambda item: (item[1].progress, item[1].waiting, item[0]))
        seconds = min(beat.idle for beat in beats) if asleep else limit
        problem = f"all processes have been idle for {seconds:.0f} s" if asleep else f"no progress for {seconds:.0f} s"
        return rank, f"hangs at {least.location}: {problem}, and this one made the least progress"

    def _end_job(self, rank: int, reason: str) -> None:
        peer = self._peers.get(rank)
        process = f" (process {peer.pid} on {peer.host.partition('/')[0]})" if peer else ""
        self._reason = f"rank {rank}{process} {reason}"
        for other in self._peers.values():
            other.send({"lost": rank, "reason": reason})
        self._lost.set()
        if "failed" not in reason and peer and peer.host == _host():
            with contextlib.suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)  # a stopped process reacts to nothing else, and its launcher waits
        if self._closing.wait(GRACE):
            return
        if self.rank == min(set(range(self.world_size)) - {rank}):
            print(f"peftkit: {self._reason}; the job ends. {self._advice}", file=sys.stderr, flush=True)
        os._exit(1)


def _host() -> str:
    """This machine's name; containers of one name differ by their process namespace."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
