"""Faults made on purpose: the n-th call of the operating system's file functions fails, or kills the process.

with Faults(at=7, fault="ENOSPC") as faults: work()
faults.calls                                          # names of the calls so far
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "pwrite", "fsync", "close", "mkdir", "replace", "rename", "unlink", "rmdir", "ftruncate")
FAULTS = ("kill", "ENOSPC", "EIO")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Counts calls of ``os``'s file functions, and lets the one numbered ``at`` (from 0) fail.

    Args:
        at: the call that fails; None counts only.
        fault: "kill" ends the process by SIGKILL before the call; else the error's name. A write that fails has
            written half of what it was given, as on a disk that fills up. EROFS spares the calls that only read.
        lasting: every later call fails as well, as on a disk that stays full or broken.
    """

    def __init__(self, at: int | None = None, fault: str = "kill", *, lasting: bool = False) -> None:
        self.at, self.fault, self.lasting = at, fault, lasting
        self.calls: list[str] = []
        self._real: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Faults:
        for name in CALLS:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrap(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self.at is None or not (number == self.at or (self.lasting and number > self.at)):
                return self._real[name](*args, **kwargs)
            if self.fault == "EROFS" and (name in {"close", "fsync"} or (name == "open" and not args[1] & WRITES)):
                return self._real[name](*args, **kwargs)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if name in {"write", "pwrite"}:
                descriptor, data, *place = args
                self._real[name](descriptor, bytes(data)[: len(data) // 2], *place)
            if name == "close":
                self._real[name](*args)  # a descriptor is gone even where close reports an error
            elif name in {"unlink", "rmdir", "close"} and self.fault == "ENOSPC":
                return self._real[name](*args, **kwargs)  # removing needs no space
            raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)))

        return call


def damage(path: Path, kind: str, generator: random.Random) -> str:
    """Truncates a file or flips one of its bits; says what was done."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        length = generator.randrange(len(content))
        path.write_bytes(bytes(content[:length]))
        return f"{path.name} cut from {len(content)} to {length} bytes"
    place, bit = generator.randrange(len(content)), generator.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"{path.name}: bit {bit} of byte {place} flipped"
