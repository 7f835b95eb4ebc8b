"""One run of an experiment, in its own process, so that neither a crash nor a leak affects the next.

A job's folder contains ``recipe.yaml``, the run's own folder, ``log.txt`` (the run's output) and, once it ended,
``outcome.json``. A stopped job resumes from its checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftkit.errors import Interrupted, PeftkitError, RunError, UserError
from peftkit.runs import folder as folders
from peftkit.schema.recipe import Recipe, flatten, replace
from peftkit.system import files

OUTCOME, LOG = "outcome.json", "log.txt"
DONE, FAILED, STOPPED, PRUNED = "done", "failed", "stopped", "pruned"
OnValidation = Callable[[int, Mapping[str, float]], bool]
"""Called with the step and the metrics of every validation; False ends the run."""
NOT_LEARNED = ("output_dir", "training.threads")
"""Fields that may differ from a job finished earlier."""


class Pruned(Exception):
    """A run was ended by its ``on_validation``."""


@dataclass(frozen=True)
class Job:
    """A recipe to run in a folder."""

    folder: Path
    recipe: Recipe
    final: bool = True
    """False only trains and validates: the test split stays unread, nothing is exported."""
    keep: bool = False
    """Resume any run in the folder, even if a field that does not affect learning differs."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str
    """DONE, FAILED, STOPPED or PRUNED."""
    run: str | None = None
    """Folder of the run, if there is one."""
    message: str = ""
    seconds: float = 0.0
    """From start to end of the process."""
    user_error: bool = False
    """Whether the input is wrong, so that a retry would fail again."""


def same_recipe(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes learn the same from the same data."""
    return learned(one) == learned(other)


def learned(recipe: Recipe) -> dict[str, Any]:
    """The fields that determine what is learned and how it is scored, by dotted name."""
    return {name: value for name, value in flatten(recipe).items() if name not in NOT_LEARNED}


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Creates and locks an experiment's folder; raises RunError if another process uses it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another with --out") from None
    try:
        yield
    finally:
        lock.release()


def earlier(job: Job) -> Outcome | None:
    """The outcome of an earlier call, or None."""
    file = job.folder / OUTCOME
    return Outcome(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def earlier_recipe(job: Job) -> Recipe | None:
    """The recipe of an earlier call in the job's folder, or None."""
    file = job.folder / folders.RECIPE
    return Recipe.from_yaml(file) if file.is_file() else None


def prepare_folder(job: Job, threads: int | None = None) -> None:
    """Creates the job's folder; runs of another recipe are removed, a stopped run of the same one stays."""
    old = earlier_recipe(job)
    if old is not None and not job.keep and not same_recipe(old, job.recipe):
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / OUTCOME).unlink(missing_ok=True)
    changes: dict[str, Any] = {"output_dir": str(job.folder)}
    if threads and job.recipe.training.threads is None:
        changes["training"] = {"threads": threads}
    (job.folder / folders.RECIPE).write_text(replace(job.recipe, **changes).to_yaml(), encoding="utf-8")


def run_job(folder: Path, *, final: bool, on_validation: OnValidation | None = None) -> Outcome:
    """Trains the recipe of a prepared folder in this process; any failure becomes the outcome's message."""
    recipe, started = Recipe.from_yaml(folder / folders.RECIPE), time.monotonic()
    from peftkit import run

    def raise_if_pruned(step: int, metrics: Mapping[str, float]) -> None:
        if on_validation is not None and not on_validation(step, metrics):
            raise Pruned

    try:
        run.train(recipe, resume=newest_run(recipe), allow=("training.threads",), quiet=True,
                  on_validation=raise_if_pruned, final=final)  # fmt: skip
        outcome = Outcome(DONE)
    except Pruned:
        outcome = Outcome(PRUNED)
    except Interrupted as error:
        outcome = Outcome(STOPPED, message=str(error))
    except PeftkitError as error:
        outcome = Outcome(FAILED, message=str(error), user_error=isinstance(error, UserError))
    except Exception as error:  # any failure is one row of the table; details are in the log
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        outcome = Outcome(FAILED, message=f"{type(error).__name__}: {first}" if first else type(error).__name__)
    _release()
    newest = newest_run(recipe)
    outcome = dataclasses.replace(outcome, run=str(newest) if newest else None, seconds=time.monotonic() - started)
    files.write_json(folder / OUTCOME, asdict(outcome))
    return outcome


def newest_run(recipe: Recipe) -> Path | None:
    """The newest run in the job's folder, stopped or finished."""
    runs = sorted(path.parent for path in Path(recipe.output_dir).glob(f"{recipe.name}-[0-9]*/{folders.RECIPE}"))
    return runs[-1] if runs else None


def _release() -> None:
    """Frees the memory of a run for the next one in the same process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class SubprocessRunner:
    """Runs each job in its own process; several at the same time if called from several threads.

    A worker reads an answer to every validation from its standard input. End of file, after ``stop`` or when this
    process dies, makes it write a checkpoint and exit.
    """

    threads: int | None = None
    """CPU threads per process, unless the recipe sets them."""
    devices: int = 0
    """Accelerators to distribute over the processes; 0 leaves all to each."""
    stopping: bool = False
    _live: dict[subprocess.Popen[str], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, job: Job, on_validation: OnValidation | None = None) -> Outcome:
        """Runs a job to its end; a process that dies is an outcome like any other."""
        prepare_folder(job, self.threads)
        started, process = time.monotonic(), self._start(job)
        if process is None:
            return Outcome(STOPPED)
        try:
            self._talk(process, on_validation)
            code = process.wait()
        except BaseException:  # Ctrl-C in this thread
            self.stop()
            process.wait()
            raise
        finally:
            with self._lock:
                self._live.pop(process, None)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        return earlier(job) or self._died(job, code, time.monotonic() - started)

    def stop(self) -> None:
        """Makes every running process write a checkpoint and exit, and starts no more."""
        with self._lock:
            self.stopping = True
            for process in self._live:
                with contextlib.suppress(OSError):
                    process.stdin.close()  # type: ignore[union-attr]

    def _start(self, job: Job) -> subprocess.Popen[str] | None:
        with self._lock:
            if self.stopping:
                return None
            command = [sys.executable, "-m", "peftkit.experiments.worker", str(job.folder)]
            command += ["final"] if job.final else ["trial"]
            slot = next(number for number in range(len(self._live) + 1) if number not in self._live.values())
            environment = dict(os.environ)
            if self.devices > 1:
                environment["CUDA_VISIBLE_DEVICES"] = _visible(slot % self.devices)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops them itself
            )  # fmt: skip
            self._live[process] = slot
            return process

    def _talk(self, process: subprocess.Popen[str], on_validation: OnValidation | None) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            keep_training = on_validation is None or on_validation(message["step"], message["metrics"])
            with contextlib.suppress(OSError, ValueError):  # it has exited, or is about to
                process.stdin.write("go\n" if keep_training else "end\n")
                process.stdin.flush()

    def _died(self, job: Job, code: int, seconds: float) -> Outcome:
        if self.stopping:
            outcome = Outcome(STOPPED, seconds=seconds)
        else:
            how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
            why = " (often the system's out-of-memory killer)" if code == -9 else ""
            outcome = Outcome(FAILED, message=f"the process was {how}{why}; see {job.folder / LOG}", seconds=seconds)
        files.write_json(job.folder / OUTCOME, asdict(outcome))
        return outcome


class InProcessRunner:
    """Runs jobs in this process: starts faster, but a crash ends everything and memory accumulates."""

    def run(self, job: Job, on_validation: OnValidation | None = None) -> Outcome:
        """Runs a job to its end."""
        prepare_folder(job)
        outcome = run_job(job.folder, final=job.final, on_validation=on_validation)
        if outcome.status == STOPPED and "stopped by SIG" in outcome.message:  # the signal was meant for the experiment
            raise KeyboardInterrupt
        return outcome

    def stop(self) -> None:
        """Does nothing: jobs run in the calling thread."""


Runner = SubprocessRunner | InProcessRunner


def _visible(number: int) -> str:
    """The accelerator of that number among those visible to this process."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if number < len(visible) else str(number)
