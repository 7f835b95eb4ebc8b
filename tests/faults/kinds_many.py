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

from peftkit.schema.recipe import Recipe, replace
from tests.faults import runs
from tests.faults.kinds import Outcome, Reference, finished

LOSSES = ("killed", "stopped", "out of memory", "hanging", "looping")
PLACES = ("step", "validation", "save")


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
    target = "all end with 143/130/138, at most a step late, none lost, resumed byte-equal"
    outcome = Outcome("SIGTERM, SIGINT, SIGUSR1 at 2 processes, in steps, validations and saves", target)
    generator, slowest, stopped = random.Random(seed), 0.0, 0
    for trial in range(trials):
        recipe, said = whole.again(folder, f"signal2-{trial}"), folder / f"signal2-{trial}.txt"
        number = generator.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        told = generator.choice([[0], [1], [0, 1]])
        step, inside, mark = generator.randint(1, 10), PLACES[trial % len(PLACES)], folder / f"at-{trial}"
        children = runs.fork_ranks(_telling(recipe, mark, step, inside), said)
        reached = _wait_for(mark, children)
        for rank in told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[rank], number)
        started = time.monotonic()
        codes = runs.wait_all(children)
        slowest = max(slowest, time.monotonic() - started)
        problems = [f"ended with {codes}"] if set(codes) not in ({0}, {128 + number}) else []
        problems += ["a traceback was shown"] if "Traceback" in said.read_text() else []
        problems += _lost_steps(recipe, mark) if any(codes) else []
        stopped += any(codes)
        who = " and ".join(f"rank {rank}" for rank in told)
        what = f"{number.name} to {who} in a {inside} at step {step}{'' if reached else ' (not reached)'}"
        outcome.count(problems + finished(recipe, whole, said, world_size=2), what)
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    outcome.figures |= {"runs that were stopped": stopped, "slowest exit, s": round(slowest, 2)}
    return outcome


def _lost_steps(recipe: Recipe, mark: Path) -> list[str]:
    """Whether the run's last checkpoint holds every step that was done, and one at most since the signal."""
    folder = runs.folder_of(recipe) or Path(recipe.output_dir)
    kept = max((int(each.name.removeprefix("step-")) for each in folder.glob("checkpoints/step-*")), default=0)
    done = int(mark.with_suffix(".done").read_text())
    before = int(mark.read_text())
    problems = [f"{done - kept} steps lost: {done} were done, the checkpoint is that of {kept}"] if kept != done else []
    return problems + ([f"{done - before} steps after the signal"] if done > before + 1 else [])


def _telling(recipe: Recipe, mark: Path, step: int, inside: str) -> Callable[[int], None]:
    """The work of a rank: rank 0 makes a file when it comes to a step's forward pass, validation or save.

    The file holds the number of steps done by then; another one beside it, those done in the end.
    """
    train = runs.train(recipe)

    def work(rank: int) -> None:
        from peftkit.runs import checkpoints
        from peftkit.training import loop
        from peftkit.training.step import Stepper

        where, name = {
            "step": (Stepper, "run"), "validation": (loop, "predict"), "save": (checkpoints, "save"),
        }[inside]  # fmt: skip
        run, seen, done = Stepper.run, [0], [0]

        def counted(self: Any, batch: Any, number: int) -> Any:
            found = run(self, batch, number)
            done[0] = number + 1
            if rank == 0:
                mark.with_suffix(".done").write_text(str(done[0]))
            return found

        Stepper.run = counted  # type: ignore[method-assign]
        real = getattr(where, name)
        last = {"step": step, "validation": 1 + step % 3, "save": step % 4}[inside]

        def told(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] > last and rank == 0 and not mark.exists():
                staged = mark.with_suffix(".staged")
                staged.write_text(str(done[0]))
                staged.rename(mark)
                time.sleep(0.2)  # for the signal to come
            return real(*args, **kwargs)

        setattr(where, name, told)
        train()

    return work


def _wait_for(mark: Path, children: list[int]) -> bool:
    """Until rank 0 has come to its mark; False when it ended before."""
    deadline = time.monotonic() + runs.LIMIT
    while not mark.exists() and time.monotonic() < deadline:
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return mark.exists()
        time.sleep(0.01)
    return mark.exists()


def lost_ranks(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """A rank is killed, stopped, out of memory, hung or looping: the job ends, names it, and is resumed."""
    kind = "a rank killed, stopped, out of memory, hung or looping"
    outcome = Outcome(kind, "ends within 60 s, not with 0, rank named, resumed byte-equal")
    generator, slowest = random.Random(seed), dict.fromkeys(LOSSES, 0.0)
    for trial in range(trials):
        recipe, said = whole.again(folder, f"lost-{trial}"), folder / f"lost-{trial}.txt"
        kind, lost, step = LOSSES[trial % len(LOSSES)], generator.randrange(2), generator.randint(2, 11)
        children = runs.fork_ranks(_losing(recipe, kind, lost, step, folder / f"lost-at-{trial}"), said)
        reached = _wait_for(folder / f"lost-at-{trial}", children)
        started = time.monotonic()
        codes = runs.wait_all(children, limit=60)
        seconds = time.monotonic() - started
        slowest[kind] = max(slowest[kind], round(seconds, 1))
        text = said.read_text()
        problems = [] if reached else ["it ended before its rank could be lost"]
        problems += ["it did not end in 60 s"] if -1000 in codes else []
        problems += [f"ended with {codes}"] if 0 in codes else []
        problems += [f"rank {lost} is not named: {text[-300:]}"] if f"rank {lost}" not in text else []
        problems += [f"rank {1 - lost} is named: {text[-300:]}"] if f"rank {1 - lost} (process" in text else []
        problems += finished(recipe, whole, said, world_size=2)
        outcome.count(problems, f"rank {lost} {kind} at step {step}")
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    outcome.figures["slowest end, s"] = slowest
    return outcome


def _losing(recipe: Recipe, kind: str, lost: int, step: int, mark: Path) -> Callable[[int], None]:
    """The work of a rank, one of which is lost when it comes to a step."""
    train = runs.train(recipe)

    def work(rank: int) -> None:
        import torch

        from peftkit.training.step import Stepper

        real = Stepper.run

        def run(self: Any, batch: Any, number: int) -> Any:
            if rank == lost and number == step:
                mark.touch()
                if kind == "out of memory":
                    torch.empty(1 << 46, dtype=torch.uint8)  # 64 TiB, which torch's allocator refuses
                if kind in {"killed", "stopped"}:
                    os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
                while True:
                    time.sleep(0.1 if kind == "hanging" else 0)
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

        real_run, real_collate, step = Stepper.run, Stepper.collate, [0]

        def run(self: Any, batch: Any, number: int) -> Any:
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            step[0] = number
            try:
                return real_run(self, batch, number)
            finally:
                step[0] = -1  # batches that are made for other ends are not trained on

        def collate(self: Any, rows: Any) -> Any:
            line = json.dumps([step[0], rank, attempt, [int(row) for row in rows]]) + "\n"
            if step[0] >= 0:
                with book.open("a") as file:
                    file.write(line)
            return real_collate(self, rows)

        Stepper.run, Stepper.collate = run, collate  # type: ignore[method-assign]
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
