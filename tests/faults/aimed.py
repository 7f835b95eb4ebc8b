"""Signals aimed at what a run is doing: a step, a validation or a save, or whatever it does at a random moment.

A forked child tells through a pipe when it enters and leaves a phase, and its parent strikes from outside some time
after; a run of an interpreter of its own tells nothing, so that its staging folder is watched for.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peftkit.runs import checkpoints
from peftkit.schema.recipe import Recipe
from tests.faults import runs

STEP, VALIDATION, SAVE = PHASES = ("step", "validation", "save")
ENTERED, LEFT = b"(", b")"
Places = Mapping[str, tuple[Any, str]]
"""Phase → the holder of the function that carries it out, and the function's name."""


class Struck(NamedTuple):
    """What came of a signal."""

    code: int
    """The exit code, negative for the signal that ended the child."""
    inside: bool
    """Whether the phase was still under way when the signal was sent."""
    seconds: float
    """From the signal to the end."""


def phases(recipe: Recipe, said: Path) -> dict[str, list[float]]:
    """Carries a recipe out in a child; the seconds of its steps, validations and saves, in turn."""
    told = said.with_suffix(".phases.json")
    train = runs.train(recipe)

    def work() -> None:
        seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

        @contextlib.contextmanager
        def timed(phase: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            seconds[phase].append(time.perf_counter() - started)

        _around(timed)
        train()
        told.write_text(json.dumps(seconds))

    code = runs.wait(runs.fork(work, said))
    assert code == 0, said.read_text()[-2000:]
    return dict(json.loads(told.read_text()))


def strike(
    train: Callable[[], Any], said: Path, phase: str, number: int, after: float, sent: int, places: Places | None = None
) -> Struck:
    """Trains in a child and sends it a signal some seconds after it entered its n-th phase of a kind.

    Args:
        places: where the phases are in the program that is tried; None takes peftkit's.
    """
    reading, writing = os.pipe()

    def work() -> None:
        os.close(reading)
        seen = dict.fromkeys(PHASES, 0)

        @contextlib.contextmanager
        def telling(name: str) -> Iterator[None]:
            aimed_at = name == phase and seen[name] == number
            seen[name] += 1
            if aimed_at:
                os.write(writing, ENTERED)
            try:
                yield
            finally:
                if aimed_at:
                    os.write(writing, LEFT)

        _around(telling, places)
        train()

    child = runs.fork(work, said)
    os.close(writing)
    inside = False
    try:  # open until the end, as the child still tells that it leaves the phase
        if _readable(reading, runs.LIMIT) and os.read(reading, 1) == ENTERED:
            inside = not _readable(reading, after)
            os.kill(child, sent)
        started = time.monotonic()
        return Struck(runs.wait(child), inside, time.monotonic() - started)
    finally:
        os.close(reading)


def strike_staged(start: Callable[[], int], root: Path, number: int, after: float) -> tuple[int, bool]:
    """SIGKILL some seconds after a run's n-th staging folder was seen under ``root``.

    Returns:
        The exit code, and whether what was staged had not yet been renamed.
    """
    child, seen = start(), set[Path]()
    deadline = time.monotonic() + runs.LIMIT
    while time.monotonic() < deadline:
        seen |= set(root.glob(f"*/checkpoints/{checkpoints.STAGING}*"))
        if len(seen) > number or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return runs.wait(child), any(root.glob(f"*/checkpoints/{checkpoints.STAGING}*"))


def after(length: Mapping[str, list[float]], phase: str, share: float) -> float:
    """A share of the longest phase of a kind, seconds."""
    return share * max(length[phase])


def _readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _around(manager: Callable[[str], Any], places: Places | None = None) -> None:
    """Puts a context manager around every phase of this process."""
    for phase, (holder, name) in (places or _ours()).items():
        setattr(holder, name, _within(getattr(holder, name), manager, phase))


def _ours() -> Places:
    from peftkit.training.loop import Loop
    from peftkit.training.step import Stepper

    return {STEP: (Stepper, "run"), VALIDATION: (Loop, "evaluate"), SAVE: (checkpoints, "save")}


def _within(real: Callable[..., Any], manager: Callable[[str], Any], phase: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with manager(phase):
            return real(*args, **kwargs)

    return call
