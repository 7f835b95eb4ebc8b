"""One run of many: carried out in a process of its own, so that neither a crash nor a leak reaches the next.

job = Job(folder, recipe)
outcome = SubprocessRunner().run(job, on_validation)      # outcome.status, outcome.message, outcome.run

A job's folder holds ``recipe.yaml``, the run's own folder, ``log.txt`` (all that the run printed) and, once it ended,
``outcome.json``. A job that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
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

OUTCOME, LOG = "outcome.json", "log.txt"
DONE, FAILED, STOPPED, PRUNED = "done", "failed", "stopped", "pruned"
Watch = Callable[[int, Mapping[str, float]], bool]
"""Told the step and the figures of every validation; False ends the run there."""
NOT_LEARNED = ("output_dir", "training.threads")
"""Fields in which a job may differ from one that was done before."""


class Pruned(Exception):
    """A run was ended because its on_validation said so."""


@dataclass(frozen=True)
class Job:
    """A recipe to be carried out in a folder."""

    folder: Path
    recipe: Recipe
    final: bool = True
    """False trains and validates only: the test split stays unread, nothing is exported."""
    keep: bool = False
    """Go on with whatever run lies in the folder, even where a field that is not learned from differs."""

    def placed(self, threads: int | None = None) -> Recipe:
        """The recipe as it is carried out: its run lies in the job's folder."""
        changes: dict[str, Any] = {"output_dir": str(self.folder)}
        if threads and self.recipe.training.threads is None:
            changes["training"] = {"threads": threads}
        return replace(self.recipe, **changes)


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str
    """DONE, FAILED, STOPPED or PRUNED."""
    run: str | None = None
    """Folder of the run, where there is one."""
    message: str = ""
    seconds: float = 0.0
    """From the process's start to its end."""
    user_error: bool = False
    """Whether something that was given is wrong, so that the same again would fail again."""


def same_recipe(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes learn the same from the same."""
    return learned(one) == learned(other)


def learned(recipe: Recipe) -> dict[str, Any]:
    """The fields that say what is learned and how it is scored, by dotted name."""
    return {name: value for name, value in flatten(recipe).items() if name not in NOT_LEARNED}


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Makes an experiment's folder and holds it; raises RunError when another process works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: another process works in this folder; wait for it or stop it") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another with --out") from None
    try:
        yield
    finally:
        lock.release()


def earlier(job: Job) -> Outcome | None:
    """What an earlier call left in the job's folder; None where nothing ended there."""
    file = job.folder / OUTCOME
    return Outcome(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def earlier_recipe(job: Job) -> Recipe | None:
    """The recipe that an earlier call wrote into the job's folder."""
    file = job.folder / folders.RECIPE
    return Recipe.from_yaml(file) if file.is_file() else None


def prepare_folder(job: Job, threads: int | None = None) -> None:
    """Makes the job's folder; what another recipe left there is removed, a stopped run of the same one stays."""
    old = earlier_recipe(job)
    if old is not None and not job.keep and not same_recipe(old, job.recipe):
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / OUTCOME).unlink(missing_ok=True)
    (job.folder / folders.RECIPE).write_text(job.placed(threads).to_yaml(), encoding="utf-8")


def run_job(folder: Path, *, final: bool, on_validation: Watch | None = None) -> Outcome:
    """Trains the recipe of a prepared folder in this process; whatever goes wrong is the outcome's message."""
    recipe, started = Recipe.from_yaml(folder / folders.RECIPE), time.monotonic()
    try:
        status, said = _train(recipe, folder, final=final, on_validation=on_validation)
    except Pruned:
        status, said = PRUNED, {}
    except Interrupted as error:
        status, said = STOPPED, {"message": str(error)}
    except PeftkitError as error:
        status, said = FAILED, {"message": str(error), "user_error": isinstance(error, UserError)}
    except Exception as error:  # a failure of any kind is one row of the table; the log has the rest
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        status, said = FAILED, {"message": f"{type(error).__name__}: {first}" if first else type(error).__name__}
    _release()
    made = {"run": _path(newest_run(recipe)), **said}
    outcome = Outcome(status, seconds=time.monotonic() - started, **made)
    folders.write_json(folder / OUTCOME, asdict(outcome))
    return outcome


def _train(recipe: Recipe, folder: Path, *, final: bool, on_validation: Watch | None) -> tuple[str, dict[str, Any]]:
    from peftkit import run

    def asked(step: int, figures: Mapping[str, float]) -> None:
        if on_validation is not None and not on_validation(step, figures):
            raise Pruned

    done = run.train(
        recipe, resume=newest_run(recipe), allow=("training.threads",), quiet=True, on_validation=asked, final=final
    )
    return DONE, {"run": str(done.path)}


def newest_run(recipe: Recipe) -> Path | None:
    """The newest run in the job's folder: one to go on with, or the finished one."""
    found = sorted(path.parent for path in Path(recipe.output_dir).glob(f"{recipe.name}-[0-9]*/{folders.RECIPE}"))
    return found[-1] if found else None


def _path(path: Path | None) -> str | None:
    return str(path) if path else None


def _release() -> None:
    """Gives back what a run held, for the next one in the same process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class SubprocessRunner:
    """Carries out jobs in processes of their own, several at a time where it is called from several threads.

    A worker hears through its standard input: an answer to every validation, and the end of the pipe, whether closed
    by ``stop`` or by this process's death, means: write a checkpoint and end.
    """

    threads: int | None = None
    """CPU threads of each, where the recipe says nothing."""
    devices: int = 0
    """Accelerators to be shared out; 0 leaves them to every process."""
    stopping: bool = False
    _live: dict[subprocess.Popen[str], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, job: Job, on_validation: Watch | None = None) -> Outcome:
        """Waits for the job's end; a process that dies is an outcome like any other."""
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
        """Asks every running process to write a checkpoint and end; none is started from now on."""
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
                start_new_session=True,  # Ctrl-C reaches this process, which tells them in its own way
            )  # fmt: skip
            self._live[process] = slot
            return process

    def _talk(self, process: subprocess.Popen[str], on_validation: Watch | None) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            go_on = on_validation is None or on_validation(said["step"], said["figures"])
            with contextlib.suppress(OSError, ValueError):  # it has ended, or was asked to
                process.stdin.write("go\n" if go_on else "end\n")
                process.stdin.flush()

    def _died(self, job: Job, code: int, seconds: float) -> Outcome:
        if self.stopping:
            outcome = Outcome(STOPPED, seconds=seconds)
        else:
            how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
            why = ", which is how the system ends a process that takes too much memory" if code == -9 else ""
            outcome = Outcome(FAILED, message=f"the process was {how}{why}; see {job.folder / LOG}", seconds=seconds)
        folders.write_json(job.folder / OUTCOME, asdict(outcome))
        return outcome


class InProcessRunner:
    """Carries out jobs in this process: at once for tiny models; a crash ends everything, and memory adds up."""

    threads: int | None = None

    def run(self, job: Job, on_validation: Watch | None = None) -> Outcome:
        """Waits for the job's end."""
        prepare_folder(job, self.threads)
        outcome = run_job(job.folder, final=job.final, on_validation=on_validation)
        if outcome.status == STOPPED and "stopped by SIG" in outcome.message:  # the signal was for all of us
            raise KeyboardInterrupt
        return outcome

    def stop(self) -> None:
        """Nothing runs beside this thread."""


Runner = SubprocessRunner | InProcessRunner


def _visible(number: int) -> str:
    """The accelerator of that number among those that this process may see."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen[number] if number < len(seen) else str(number)
