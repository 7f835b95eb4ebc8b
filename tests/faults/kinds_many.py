"""Faults of runs of two processes over gloo: signals, ranks that die, stop or hang, and the ledger of rows."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.recipe import Recipe, replace
from tests.faults import runs
from tests.faults.kinds import Outcome, Reference, finished

LOSSES = ("killed", "stopped", "out of memory", "hanging")


def reference(folder: Path, kind: str = "encoder", **parts: Any) -> Reference:
    """The uninterrupted run of two processes."""
    recipe = replace(runs.KINDS[kind](folder, **parts), output_dir=str(folder / "two-whole"))
    said = folder / "two-whole.txt"
    started = time.monotonic()
    code = runs.finish(recipe, said, world_size=2)
    assert code == 0, said.read_text()[-3000:]
    path = runs.folder_of(recipe)
    assert path is not None
    return Reference(recipe, path, time.monotonic() - started)


def signals(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """A signal to both processes or to one alone: all agree on the step, end with its code, and are resumed."""
    outcome = Outcome("SIGTERM, SIGINT, SIGUSR1 at 2 processes", "all end with 143/130/138, resumed byte-equal")
    generator, slowest, stopped = random.Random(seed), 0.0, 0
    for trial in range(trials):
        recipe, said = whole.again(folder, f"signal2-{trial}"), folder / f"signal2-{trial}.txt"
        number, alone = generator.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]), generator.random() < 0.5
        step, inside = generator.randint(1, 10), generator.choice(["step", "validation", "save"])
        children = runs.fork_ranks(_telling(recipe, folder / f"at-{trial}", step, inside), said)
        reached = _wait_for(folder / f"at-{trial}", children)
        for child in children[:1] if alone else children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        started = time.monotonic()
        codes = runs.wait_all(children)
        slowest = max(slowest, time.monotonic() - started)
        problems = [f"ended with {codes}"] if set(codes) not in ({0}, {128 + number}) else []
        problems += ["a traceback was shown"] if "Traceback" in said.read_text() else []
        stopped += any(codes)
        who = "rank 0" if alone else "both"
        what = f"{number.name} to {who} in a {inside} at step {step}{'' if reached else ' (not reached)'}"
        outcome.count(problems + finished(recipe, whole, said, world_size=2), what)
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    outcome.figures |= {"runs that were stopped": stopped, "slowest exit, s": round(slowest, 2)}
    return outcome


def _telling(recipe: Recipe, mark: Path, step: int, inside: str) -> Callable[[int], None]:
    """The work of a rank: rank 0 makes a file when it comes to a step's forward pass, validation or save."""
    train = runs.train(recipe)

    def work(rank: int) -> None:
        from peftkit.training import checkpoints, loop
        from peftkit.training.step import Stepper

        where, name = {
            "step": (Stepper, "run"), "validation": (loop, "predict"), "save": (checkpoints, "save"),
        }[inside]  # fmt: skip
        real, seen = getattr(where, name), [0]
        last = {"step": step, "validation": 1 + step % 3, "save": step % 4}[inside]

        def told(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] > last and rank == 0:
                mark.touch()
                time.sleep(0.05)
            return real(*args, **kwargs)

        setattr(where, name, told)
        train()

    return work


def _wait_for(mark: Path, children: list[int]) -> bool:
    """Until rank 0 has come to its mark; False when it ended before."""
    deadline = time.monotonic() + runs.LIMIT
    while not mark.exists() and time.monotonic() < deadline:
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.01)
    return mark.exists()


def lost_ranks(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """Rank 1 is killed, stopped, out of memory, or loops for ever: the job ends, names it, and is resumed."""
    outcome = Outcome("a rank killed, stopped, out of memory or hanging", "ends within 60 s, rank named, resumed equal")
    generator, slowest = random.Random(seed), dict.fromkeys(LOSSES, 0.0)
    for trial in range(trials):
        recipe, said = whole.again(folder, f"lost-{trial}"), folder / f"lost-{trial}.txt"
        kind, step = LOSSES[trial % len(LOSSES)], generator.randint(2, 11)
        children = runs.fork_ranks(_losing(recipe, kind, step, folder / f"lost-at-{trial}"), said)
        _wait_for(folder / f"lost-at-{trial}", children)
        started = time.monotonic()
        codes = runs.wait_all(children, limit=60)
        seconds = time.monotonic() - started
        slowest[kind] = max(slowest[kind], round(seconds, 1))
        text = said.read_text()
        problems = ["it did not end in 60 s"] if -1000 in codes else []
        problems += [f"ended with {codes}"] if 0 in codes else []
        problems += [f"rank 1 is not named: {text[-300:]}"] if "rank 1" not in text else []
        outcome.count(problems + finished(recipe, whole, said, world_size=2), f"rank 1 {kind} at step {step}")
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    outcome.figures["slowest end, s"] = slowest
    return outcome


def _losing(recipe: Recipe, kind: str, step: int, mark: Path) -> Callable[[int], None]:
    train = runs.train(recipe)

    def work(rank: int) -> None:
        from peftkit.training.step import Stepper

        real = Stepper.run

        def run(self: Any, batch: Any, number: int) -> Any:
            if rank == 1 and number == step:
                mark.touch()
                if kind == "out of memory":
                    raise MemoryError("Unable to allocate 64.0 GiB")
                if kind != "hanging":
                    os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
                while True:
                    time.sleep(0.1)
            return real(self, batch, number)

        Stepper.run = run  # type: ignore[method-assign]
        train()

    return work


def ledger(folder: Path, trials: int, seed: int = 0) -> Outcome:
    """Rows that each process trained on, written down: through kills and resumes every step has its rows, once."""
    outcome = Outcome("ledger of rows, 2 processes, kills across epochs", "0 repeated, 0 missed, the same order")
    generator = random.Random(seed)
    recipe = replace(runs.encoder(folder), name="ledger", training={"epochs": 3, "micro_batch": 2})
    book = folder / "book-whole.jsonl"
    whole = replace(recipe, output_dir=str(folder / "ledger-whole"))
    codes = runs.wait_all(runs.fork_ranks(_writing(whole, book, resume=False), folder / "ledger.txt"))
    assert codes == [0, 0], (folder / "ledger.txt").read_text()[-2000:]
    expected = _entries(book)
    for trial in range(trials):
        again, book = replace(recipe, output_dir=str(folder / f"ledger-{trial}")), folder / f"book-{trial}.jsonl"
        stops = sorted(generator.sample(range(2, 20), generator.randint(1, 2)))
        for attempt, stop in enumerate([*stops, None]):
            resume = runs.folder_of(again) is not None
            work = _writing(again, book, resume=resume, stop=stop, attempt=attempt)
            codes = runs.wait_all(runs.fork_ranks(work, folder / f"ledger-{trial}.txt"))
        problems = [] if codes == [0, 0] else [f"ended with {codes}"]
        found = _entries(book)
        problems += [] if found == expected else ["steps trained on other rows, or in another order"]
        rows = Counter(row for step in found for row in step[1])
        problems += [] if set(rows.values()) == {3} else ["a row was not seen once an epoch"]
        outcome.count(problems, f"killed at steps {stops}")
        shutil.rmtree(again.output_dir, ignore_errors=True)
    return outcome


def _writing(
    recipe: Recipe, book: Path, *, resume: bool, stop: int | None = None, attempt: int = 0
) -> Callable[[int], None]:
    """The work of a rank that writes down the rows of its micro-batches, and is killed at a step."""
    train = runs.train(recipe, resume=resume)

    def work(rank: int) -> None:
        from peftkit.training.step import Stepper

        real_run, real_batch, step = Stepper.run, Stepper.batch, [0]

        def run(self: Any, batch: Any, number: int) -> Any:
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            step[0] = number
            try:
                return real_run(self, batch, number)
            finally:
                step[0] = -1  # batches that are made for other ends are not trained on

        def batch(self: Any, rows: Any) -> Any:
            line = json.dumps([step[0], rank, attempt, [int(row) for row in rows]]) + "\n"
            if step[0] >= 0:
                with book.open("a") as file:
                    file.write(line)
            return real_batch(self, rows)

        Stepper.run, Stepper.batch = run, batch  # type: ignore[method-assign]
        train()

    return work


def _entries(book: Path) -> list[tuple[int, list[int], list[Any]]]:
    """Every step's rows and who had them; of a step that was repeated after a kill, the last time."""
    steps: dict[int, dict[int, tuple[int, list[Any]]]] = {}
    for line in book.read_text().splitlines():
        step, rank, attempt, rows = json.loads(line)
        ranks = steps.setdefault(step, {})
        if ranks.get(rank, (-1, []))[0] < attempt:
            ranks[rank] = (attempt, [])
        ranks[rank][1].append(rows)
    return [
        (step, sorted({row for _, held in ranks.values() for piece in held for row in piece}),
         [(rank, held) for rank, (_, held) in sorted(ranks.items())])
        for step, ranks in sorted(steps.items())
    ]  # fmt: skip
