"""Disks that are full or read-only: runs go on, or stop with one message and go on once there is room again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.runs import checkpoints
from peftkit.schema.recipe import Recipe, replace
from tests.faults import disks, runs
from tests.faults.injection import Faults
from tests.faults.kinds import Outcome, Reference, begin, finished

START, RESUMED, DURING = READ_ONLY = ("at the start", "when it is resumed", "during the run")


def full_disk(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """A whole run on a disk with less room than it needs: one message, no traceback; with room, resumed to the end."""
    outcome = begin(
        f"a disk that is full at any point: {whole.recipe.name}", "stops with one message, resumes byte-equal"
    )
    needed = disks.used(Path(whole.recipe.output_dir)) // len(list(Path(whole.recipe.output_dir).glob("*")))
    for trial, generator in outcome.left(trials, seed):
        size = generator.randrange(8, needed)
        place = folder / f"disk-{whole.recipe.name}-{trial}"
        recipe, said = replace(whole.recipe, output_dir=str(place / "runs")), place.with_suffix(".txt")
        with disks.disk(place, size):
            code = runs.run(recipe, said=said)
            problems = _one_message(code, said, expected=(0, 1, 2))
            outcome.add("runs that stopped", code != 0)
            outcome.add("runs that went on with the checkpoints before", code == 0)
            kept = _broken(Path(recipe.output_dir))
            disks.resize(place, 4 * needed)
            outcome.count(problems + kept + finished(recipe, whole, said), f"a disk of {size} KiB, ended with {code}")
    return outcome


def read_only(folder: Path, whole: Reference, only: tuple[str, ...] = READ_ONLY) -> Outcome:
    """A read-only disk before, in and after a run: one message and the exit code of its kind; then resumed."""
    outcome = begin(f"a read-only disk: {whole.recipe.name}", "one line, exit code 1 or 2, resumes byte-equal")
    for trial, _ in outcome.left(len(only), 0):
        when = only[trial]
        place = folder / f"read-only {when}"
        said = place.with_suffix(".txt")
        recipe = replace(whole.recipe, output_dir=str(place / "runs"))
        if when == DURING:
            problems = _refused(_locked_later(recipe), said, expected=1)
            outcome.count(problems + finished(recipe, whole, said), when)
            continue
        with disks.disk(place, 1 << 16):
            if when == RESUMED:
                shutil.copytree(whole.recipe.output_dir, recipe.output_dir)
                shutil.rmtree(next(Path(recipe.output_dir).glob("*/adapter")))
            disks.read_only(place)
            problems = _refused(runs.train(recipe, resume=when == RESUMED), said, expected=2)
            disks.read_only(place, on=False)
            outcome.count(problems + finished(recipe, whole, said), when)
    return outcome


def _refused(work: Callable[[], Any], said: Path, expected: int) -> list[str]:
    """What is wrong with the way in which a child ends that finds its disk read-only."""
    problems = _one_message(runs.wait(runs.fork(work, said)), said, expected=(expected,))
    return problems if "ead-only" in said.read_text() else [*problems, f"said {said.read_text()[-200:]}"]


def _locked_later(recipe: Recipe) -> Callable[[], None]:
    """The work of a child for which the disk is read-only from its third checkpoint on.

    No disk can be made read-only while a file on it is open for writing, so that the calls are made to fail.
    """
    train = runs.train(recipe)

    def work() -> None:
        real, seen = checkpoints.save, [0]
        faults = Faults(0, "EROFS", lasting=True)

        def save(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == 3:
                faults.__enter__()
            return real(*args, **kwargs)

        checkpoints.save = save
        train()

    return work


def _one_message(code: int, said: Path, expected: tuple[int, ...]) -> list[str]:
    text = said.read_text()
    problems = [] if code in expected else [f"ended with {code}: {text[-300:]}"]
    if "Traceback" in text:
        problems.append(f"a traceback was shown: {text[-300:]}")
    if code and text.count("peftkit: ") != 1:
        problems.append(f"{text.count('peftkit: ')} messages")
    return problems


def _broken(output: Path) -> list[str]:
    """Checkpoints under their own names that are not whole."""
    found = [path for root in output.glob("*/checkpoints") for _, path in checkpoints.candidates(root)]
    return [f"{path.name} is not whole" for path in found if checkpoints.verify(path)]
