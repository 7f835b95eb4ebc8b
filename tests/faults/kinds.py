"""The kinds of faults, each with a count; what went wrong is told trial by trial.

    outcome = kills(folder, "encoder", trials=100)
    outcome.passed, outcome.trials, outcome.failures

Every function takes a folder to work in, the number of trials, and a seed from which every trial's fault follows.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import CheckpointError
from peftkit.runs import checkpoints
from peftkit.schema.recipe import Recipe, replace
from tests.faults import aimed, runs
from tests.faults.injection import FAULTS, Faults, damage


@dataclass
class Outcome:
    """What came of the trials of one kind of fault."""

    kind: str
    target: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        """Trials that met the target."""
        return self.trials - len(self.failures)

    def count(self, problems: list[str], trial: str) -> None:
        """Adds a trial."""
        self.trials += 1
        if problems:
            self.failures.append(f"{trial}: {'; '.join(problems)}")
        for tell in LISTENERS:
            tell(self)

    def left(self, trials: int, seed: int) -> Iterator[tuple[int, random.Random]]:
        """Number of every trial that is still to be made, and what its fault is drawn from."""
        for trial in range(self.trials, trials):
            yield trial, random.Random(f"{self.kind} {seed} {trial}")

    def add(self, name: str, value: float) -> None:
        """Adds to a figure."""
        self.figures[name] = self.figures.get(name, 0) + value

    def most(self, name: str, value: float) -> None:
        """Keeps the largest value of a figure."""
        self.figures[name] = round(max(self.figures.get(name, 0.0), value), 2)


LISTENERS: list[Callable[[Outcome], None]] = []
"""Told of every trial as soon as it is over."""
HELD: dict[str, Outcome] = {}
"""What an earlier, interrupted campaign had found; its trials are not made again."""


def begin(kind: str, target: str) -> Outcome:
    """The outcome of a kind, with the trials that were made before."""
    return HELD.pop(kind, None) or Outcome(kind, target)


@dataclass
class Reference:
    """The uninterrupted run, how long it takes from fork to end, and how long its steps, validations and saves."""

    recipe: Recipe
    path: Path
    seconds: float
    phases: dict[str, list[float]] = field(default_factory=dict)

    def again(self, folder: Path, name: str) -> Recipe:
        """The same recipe in a folder of its own."""
        return replace(self.recipe, output_dir=str(folder / name))

    def trial(self, folder: Path, name: str) -> tuple[Recipe, Path]:
        """The same recipe in a folder that no other trial uses, and a file for what it says."""
        recipe = self.again(folder, f"{self.recipe.name}-{name}")
        return recipe, Path(f"{recipe.output_dir}.txt")


def reference(folder: Path, kind: str, **parts: Any) -> Reference:
    """Runs a kind of recipe to its end; twice, as the first fills the caches."""
    recipe = replace(runs.KINDS[kind](folder, **parts), output_dir=str(folder / f"{kind}-whole"))
    said = folder / f"{kind}-whole.txt"
    assert runs.run(recipe, said=said) == 0, said.read_text()[-2000:]
    started = time.monotonic()
    phases = aimed.phases(recipe, said)
    seconds = time.monotonic() - started
    path = runs.folder_of(recipe)
    assert path is not None
    return Reference(recipe, path, seconds, phases)


def finished(recipe: Recipe, whole: Reference, said: Path, world_size: int = 1) -> list[str]:
    """Goes on with a run that was cut off, and tells what is not as in the whole one."""
    code = runs.finish(recipe, said, world_size)
    if code:
        return [f"going on ended with {code}: {said.read_text()[-300:]}"]
    return runs.differences(runs.folder_of(recipe), whole.path)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def kills(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of a whole run, one to three times, then resumed to the end."""
    outcome = begin(f"kill -9 at random moments: {whole.recipe.name}", "adapter, log and metrics byte-equal")
    for trial, generator in outcome.left(trials, seed):
        recipe, said = whole.trial(folder, f"kill-{trial}")
        moments = [generator.uniform(0, whole.seconds) for _ in range(generator.randint(1, 3))]
        for moment in moments:
            child = runs.fork(runs.train(recipe, resume=runs.folder_of(recipe) is not None), said)
            outcome.add("kills that met a living process", _killed(child, moment))
        outcome.count(finished(recipe, whole, said), f"killed after {', '.join(f'{each:.2f}' for each in moments)} s")
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    return outcome


def kills_in_stages(folder: Path, stages: Sequence[Reference]) -> Outcome:
    """Each of several stages, which stand on one another, is killed in a step, resumed and killed in a save."""
    outcome = begin("kill -9 in every stage", "adapter, log and metrics byte-equal")
    before: Path | None = None
    for whole in stages:
        recipe, said = whole.trial(folder, "staged")
        if before is not None:
            recipe = replace(recipe, model={"adapter": str(before)})
        problems = []
        for resume, phase, number in ((False, aimed.STEP, 5), (True, aimed.SAVE, 1)):
            after = aimed.after(whole.phases, phase, 0.5)
            struck = aimed.strike(runs.train(recipe, resume=resume), said, phase, number, after, signal.SIGKILL)
            if struck.code != -signal.SIGKILL:
                problems.append(f"the run to be killed in a {phase} ended with {struck.code}")
        outcome.count(problems + finished(recipe, whole, said), f"stage {recipe.name}")
        before = runs.folder_of(recipe)
    return outcome


def fresh_kills(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """The command line in interpreters of their own, killed at random moments and in saves seen from outside."""
    outcome = begin(
        f"kill -9 of the command line, nothing forked: {whole.recipe.name}", "adapter, log and metrics byte-equal"
    )
    seconds = _fresh_seconds(folder, whole) if outcome.trials < trials else 0.0
    for trial, generator in outcome.left(trials, seed):
        recipe, said = whole.trial(folder, f"fresh-{whole.recipe.name}-{trial}")
        root = Path(recipe.output_dir)
        if trial % 2:
            save, after = generator.randrange(3), aimed.after(whole.phases, aimed.SAVE, generator.random())
            start = lambda recipe=recipe, said=said: runs.fresh(recipe, said)  # noqa: E731
            killed, inside = aimed.strike_staged(start, root, save, after)
            outcome.add("kills that fell into a save", inside)
            what = f"killed {1000 * after:.0f} ms into save {save}"
        else:
            moment = generator.uniform(0, seconds)
            killed = -signal.SIGKILL * _killed(runs.fresh(recipe, said), moment)
            what = f"killed after {moment:.2f} s"
        outcome.add("kills that met a living process", killed == -signal.SIGKILL)
        code = runs.wait(runs.fresh(recipe, said, resume=runs.folder_of(recipe)), runs.FRESH_LIMIT)
        problems = [f"going on ended with {code}: {said.read_text()[-300:]}"] if code else []
        outcome.count(problems or runs.differences(runs.folder_of(recipe), whole.path), what)
        shutil.rmtree(root, ignore_errors=True)
    return outcome


def _fresh_seconds(folder: Path, whole: Reference) -> float:
    """From the start of an interpreter to its end, uninterrupted; what it made must be what a forked child makes."""
    name = f"fresh-whole-{whole.recipe.name}"
    recipe, said = whole.again(folder, name), folder / f"{name}.txt"
    started = time.monotonic()
    assert runs.wait(runs.fresh(recipe, said), runs.FRESH_LIMIT) == 0, said.read_text()[-2000:]
    seconds = time.monotonic() - started
    assert runs.differences(runs.folder_of(recipe), whole.path) == []
    return seconds


def _killed(child: int, moment: float) -> bool:
    """Whether the kill, after so many seconds, met a living process."""
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return runs.wait(child) == -signal.SIGKILL


def kills_in_saves(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """SIGKILL inside a random save: in turn before a random call of the file system, and from outside at any time."""
    outcome = begin(f"kill -9 inside a save: {whole.recipe.name}", "adapter, log and metrics byte-equal")
    for trial, generator in outcome.left(trials, seed):
        recipe, said = whole.trial(folder, f"save-{trial}")
        save = generator.randrange(len(whole.phases[aimed.SAVE]))
        if trial % 2:
            after = aimed.after(whole.phases, aimed.SAVE, generator.random())
            code, inside, _ = aimed.strike(runs.train(recipe), said, aimed.SAVE, save, after, signal.SIGKILL)
            what = f"killed {1000 * after:.0f} ms into save {save}"
        else:
            call = generator.randrange(45)
            code = runs.wait(runs.fork(faulty_saves(recipe, save, call, "kill"), said))
            inside, what = True, f"killed at call {call} of save {save}"
        outcome.add("kills that fell into a save", inside and code == -signal.SIGKILL)
        outcome.count(finished(recipe, whole, said), what)
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    return outcome


def failing_saves(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """A save of a living run fails by ENOSPC or EIO: it goes on, or stops with one line and is resumed."""
    outcome = begin(
        f"full or broken disk in a save: {whole.recipe.name}", "continues, or stops with one message and resumes"
    )
    for trial, generator in outcome.left(trials, seed):
        recipe, said = whole.trial(folder, f"full-{trial}")
        save, fault = generator.randrange(len(whole.phases[aimed.SAVE])), generator.choice(FAULTS[1:])
        call = generator.randrange(45)
        code = runs.wait(runs.fork(faulty_saves(recipe, save, call, fault), said))
        text = said.read_text()
        problems = ["a traceback was shown"] if "Traceback" in text else []
        if code == 0:
            outcome.add("runs that went on", 1)
            problems += runs.differences(runs.folder_of(recipe), whole.path)
        else:
            problems += [f"ended with {code}"] if code != 1 else []
            problems += finished(recipe, whole, said)
        outcome.count(problems, f"{fault} at call {call} of save {save}")
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    return outcome


def faulty_saves(recipe: Recipe, save: int, call: int, fault: str) -> Any:
    """The work of a child in whose ``save``-th checkpoint the ``call``-th call fails."""
    train = runs.train(recipe)

    def work() -> None:
        seen, real = [0], checkpoints.save

        def faulty(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            with Faults(call if seen[0] == save + 1 else None, fault):
                return real(*args, **kwargs)

        checkpoints.save = faulty
        train()

    return work


# -- the file system, call by call -------------------------------------------------------------------------------------


def _save(root: Path, step: int) -> None:
    tensors = {f"layer.{n}.weight": torch.full((4, 8), float(step * 10 + n)) for n in range(3)}
    moments = {f"{name}/exp_avg": tensor / 2 for name, tensor in tensors.items()}
    checkpoints.save(root, step, model=tensors, optimizer=moments, state={"step": step})
    checkpoints.prune(root, keep=2, protect={1})


def every_call(folder: Path) -> Outcome:
    """Every call of a save and the pruning after it × kill, ENOSPC, EIO, once and lasting: a checkpoint is left."""
    outcome = Outcome(
        "every file-system call of one save × kill, ENOSPC, EIO", "a complete checkpoint, the newest or the one before"
    )
    start = folder / "start"
    for step in (1, 2, 3):
        _save(start, step)
    for step in (4, 3):  # a new step, and the newest one once more, as a resumed run does
        root = folder / "trial"
        shutil.copytree(start, root)
        with Faults() as counted:
            _save(root, step)
        shutil.rmtree(root)
        for fault in FAULTS:
            for lasting in (False, True) if fault != "kill" else (False,):
                for at in range(len(counted.calls)):
                    shutil.copytree(start, root)
                    said = f"step {step}, {fault}{' for good' * lasting} at call {at} ({counted.calls[at]})"
                    outcome.count(_one_call(root, step, at, fault, lasting), said)
                    shutil.rmtree(root)
        outcome.figures["calls of a save" if step == 4 else "calls of a save over one of its step"] = len(counted.calls)
    return outcome


def _one_call(root: Path, step: int, at: int, fault: str, lasting: bool) -> list[str]:
    def work() -> None:
        with Faults(at, fault, lasting=lasting), contextlib.suppress(CheckpointError):
            _save(root, step)

    if fault == "kill":
        code = runs.wait(runs.fork(work))
        if code not in (0, -signal.SIGKILL):
            return [f"the child ended with {code}"]
    else:
        work()
    checkpoints.remove_staged(root)  # what a resumed run does first
    newest, rejected = checkpoints.newest(root)
    problems = [f"rejected: {line}" for line in rejected]
    if newest is None or newest.step not in (3, 4):
        return [*problems, f"the newest whole checkpoint is {newest and newest.step}"]
    if newest.state() != {"step": newest.step}:
        problems.append("its state is another step's")
    value = newest.tensors(checkpoints.MODEL)["layer.1.weight"][0, 0].item()
    if value != newest.step * 10 + 1:
        problems.append("its tensors are another step's")
    odd = [path.name for path in root.iterdir() if not checkpoints.NAME.fullmatch(path.name)]
    return problems + ([f"left behind: {odd}"] if odd else [])


# -- damaged files -----------------------------------------------------------------------------------------------------


def damaged(folder: Path, kind: str, trials: int, seed: int = 0) -> Outcome:
    """One file of the newest checkpoint truncated, or one bit of it flipped: it is named, the one before used."""
    outcome = Outcome(f"{kind} checkpoint files", "detected and named, the previous one used")
    generator, harmless = random.Random(seed), 0
    start = folder / "start"
    for step in (1, 2):
        _save(start, step)
    files = [checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.MANIFEST]
    for trial in range(trials):
        root = folder / "trial"
        shutil.copytree(start, root)
        newest = root / "step-00000002"
        done = damage(newest / files[trial % len(files)], kind, generator)
        checkpoint, rejected = checkpoints.newest(root)
        problems = []
        if checkpoint and checkpoint.step == 2 and trial % len(files) == 3:
            harmless += 1  # a bit in the manifest's white space: what it says is the same, and all files fit it
            problems += [] if _same(checkpoint, start / "step-00000002") else ["a changed checkpoint was used"]
        elif checkpoint is None or checkpoint.step != 1:
            problems.append(f"used: {checkpoint and checkpoint.path.name}")
        elif len(rejected) != 1 or str(newest) not in rejected[0]:
            problems.append(f"said: {rejected}")
        outcome.count(problems, done)
        shutil.rmtree(root)
    if harmless:
        outcome.figures["flips in the manifest's white space, where all files still fit it"] = harmless
    return outcome


def _same(checkpoint: checkpoints.Checkpoint, original: Path) -> bool:
    """Whether everything that is used of a checkpoint is as in the original."""
    names = (checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE)
    return all((checkpoint.path / name).read_bytes() == (original / name).read_bytes() for name in names)


# -- signals -----------------------------------------------------------------------------------------------------------


def signals(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """SIGTERM, SIGINT or SIGUSR1 in steps, validations, saves and at random moments: the exit code says which.

    The run ends in time, its newest checkpoint is of the step that it says it stopped after, and it is resumed.
    """
    outcome = begin(f"SIGTERM, SIGINT, SIGUSR1: {whole.recipe.name}", "exit 143/130/138 in time, resumed byte-equal")
    for trial, generator in outcome.left(trials, seed):
        recipe, said = whole.trial(folder, f"signal-{trial}")
        number = generator.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        phase = (*aimed.PHASES, "")[trial % 4]
        if phase:
            after = aimed.after(whole.phases, phase, generator.random())
            nth = generator.randrange(len(whole.phases[phase]))
            code, inside, seconds = aimed.strike(runs.train(recipe), said, phase, nth, after, number)
            what = f"{number.name} {1000 * after:.0f} ms into {phase} {nth}"
            outcome.add(f"signals that fell into a {phase}", inside)
        else:
            moment = generator.uniform(0.15 * whole.seconds, whole.seconds)
            code, seconds = _signalled(recipe, said, moment, number)
            what = f"{number.name} after {moment:.2f} s"
        outcome.most("slowest exit, s", seconds)
        outcome.add("runs that were stopped", code != 0)
        outcome.count(_stopped_well(recipe, said, code, number) + finished(recipe, whole, said), what)
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    return outcome


def _signalled(recipe: Recipe, said: Path, moment: float, number: signal.Signals) -> tuple[int, float]:
    child = runs.fork(runs.train(recipe), said)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    started = time.monotonic()
    return runs.wait(child), time.monotonic() - started


def _stopped_well(recipe: Recipe, said: Path, code: int, number: signal.Signals) -> list[str]:
    """What is not handled as intended with a run that got a signal: exit code, message, the step that was kept."""
    text, run = said.read_text(), runs.folder_of(recipe)
    problems = [f"ended with {code}"] if code not in (0, 128 + number, -number) else []
    problems += ["a traceback was shown"] if "Traceback" in text else []
    stopped = re.search(r"stopped by \w+ after step (\d+) of", text)
    if stopped and run is not None:
        kept, _ = checkpoints.newest(run / "checkpoints")
        if kept is None or kept.step != int(stopped[1]):
            problems.append(f"stopped after step {stopped[1]}, kept is {kept and kept.step}")
    return problems
