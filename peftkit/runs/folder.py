"""A run's folder: created, found, locked while in use, and described.

output_dir/NAME-20261122-140501/
    recipe.yaml  info.json  environment.json  metrics.json  metrics.jsonl  report.html
    checkpoints/  adapter/ (or model/)  predictions/  plots/
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit.distributed.session import Session
from peftkit.errors import Interrupted, RunError, UserError
from peftkit.runs import checkpoints
from peftkit.runs.environment import ENVIRONMENT, environment
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo
from peftkit.system import files

RECIPE, INFO, METRICS, LOG = "recipe.yaml", "info.json", "metrics.json", "metrics.jsonl"


def open_folder(recipe: Recipe, session: Session, resume: str | Path | bool | None) -> Path:
    """The folder of the run to resume, or a new one; the same on every process."""
    return session.run_on_main(lambda: find_run(recipe, resume) if resume else _new_folder(recipe))


def find_run(recipe: Recipe, resume: str | Path | bool) -> Path:
    """The run folder to resume: the one given, or for True the newest of the recipe's name."""
    if isinstance(resume, bool):
        runs = sorted(path.parent for path in Path(recipe.output_dir).glob(f"{recipe.name}-[0-9]*/{RECIPE}"))
        if not runs:
            raise RunError(f"there is no run of '{recipe.name}' in {recipe.output_dir} to resume; start one first")
        return runs[-1]
    path = Path(resume)
    if not (path / RECIPE).is_file():
        raise RunError(f"{path} is not a run folder: it has no {RECIPE}")
    return path


def _new_folder(recipe: Recipe) -> Path:
    path = Path(recipe.output_dir) / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for free in (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                free.mkdir()
                return free
    except OSError as error:
        raise RunError(
            f"output_dir '{recipe.output_dir}' cannot be written ({error.strerror}); choose another output_dir"
        ) from None
    raise RunError(f"{path}: no free name for the run folder; start the run again in a second")


@contextlib.contextmanager
def locked(folder: Path, session: Session, *, new: bool) -> Iterator[None]:
    """Locks the folder for this run, and removes a new one if the run is stopped before its first checkpoint.

    Raises:
        RunError: another process trains in the folder, or it cannot be written.
    """
    lock = FileLock(folder / ".lock", timeout=0)

    def acquire() -> None:
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"{folder}: another process is training in this folder; wait for it or stop it") from None
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}), so the run cannot be resumed") from None

    session.run_on_main(acquire)
    try:
        yield
    except (UserError, Interrupted):
        if new and not (folder / "checkpoints").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def describe_run(folder: Path, recipe: Recipe, info: TaskInfo, session: Session) -> None:
    """Writes recipe, task info and environment."""
    if session.is_main:
        files.write_text(folder / RECIPE, recipe.to_yaml())
        files.write_json(folder / INFO, asdict(info))
        files.write_json(folder / ENVIRONMENT, environment(session))


def remove_staged(folder: Path) -> None:
    """Removes what a killed run left staged; requires the run's lock."""
    checkpoints.remove_staged(folder / "checkpoints")
    for path in folder.glob(".*"):
        if path.suffix == ".tmp" and path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir() and path.name.startswith((".adapter.", ".model.", ".merged.")):
            shutil.rmtree(path, ignore_errors=True)
