"""A run's folder: made once, locked while in use, and what it says of how it came about.

output_dir/NAME-20261122-140501/
    recipe.yaml  info.json  environment.json  metrics.json  metrics.jsonl  report.html
    checkpoints/  adapter/ (or model/)  predictions/  plots/
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftkit.distributed.session import Session, flat
from peftkit.errors import CheckpointError, RunError
from peftkit.runs import checkpoints
from peftkit.runs.checkpoints import Checkpoint
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo
from peftkit.system import files
from peftkit.system.parallel import cores

PACKAGES = (
    "peftkit", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes",
)  # fmt: skip
SURROUNDINGS = ("python", "machine", "device", "threads", "dtype")
RECIPE, INFO, ENVIRONMENT, METRICS, LOG = (
    "recipe.yaml",
    "info.json",
    "environment.json",
    "metrics.json",
    "metrics.jsonl",
)


def new_folder(recipe: Recipe, session: Session) -> Path:
    """A fresh folder under ``output_dir``, the same on every process; raises RunError where none can be made."""

    def make() -> Path:
        root = Path(recipe.output_dir)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            root.mkdir(parents=True, exist_ok=True)
            return _first_free(root / f"{recipe.name}-{stamp}")
        except OSError as error:
            raise RunError(f"output_dir '{recipe.output_dir}' cannot be written: {error.strerror}") from None

    return Path(session.run_on_main(make))


def _first_free(path: Path) -> Path:
    for number in range(1, 1000):
        attempt = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            attempt.mkdir()
            return attempt
    raise RunError(f"{path}: a thousand runs of this second exist")


def find_run(recipe: Recipe | None, resume: str | Path | bool) -> Path:
    """The folder that ``--resume`` means: the one named, or the recipe's newest."""
    if isinstance(resume, bool):
        assert recipe is not None, "resuming the newest run needs a recipe's name"
        runs = sorted(path.parent for path in Path(recipe.output_dir).glob(f"{recipe.name}-[0-9]*/{RECIPE}"))
        if not runs:
            raise RunError(f"there is no run of '{recipe.name}' in {recipe.output_dir} to resume; start one first")
        return runs[-1]
    path = Path(resume)
    if not (path / RECIPE).is_file():
        raise RunError(f"{path} is not a run's folder: it has no {RECIPE}")
    return path


@contextlib.contextmanager
def locked(folder: Path, session: Session) -> Iterator[None]:
    """Holds the folder for this run; raises RunError when another process trains in it."""
    lock = FileLock(folder / ".lock", timeout=0)

    def acquire() -> None:
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"{folder}: another process is training in this folder; wait for it or stop it") from None
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror}), so no run can go on in it") from None

    session.run_on_main(acquire)
    try:
        yield
    finally:
        lock.release()


def describe_run(folder: Path, recipe: Recipe, info: TaskInfo, session: Session) -> None:
    """Writes recipe, task info and environment."""
    if session.is_main:
        write_text(folder / RECIPE, recipe.to_yaml())
        write_json(folder / INFO, asdict(info))
        write_json(folder / ENVIRONMENT, environment(session))


def environment(session: Session) -> dict[str, Any]:
    """Versions and hardware; nothing of the process's environment variables, where secrets live."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": cores(),
        "device": _device_name(session),
        "processes": session.world_size,
        "threads": session.threads,
        "dtype": str(session.dtype).removeprefix("torch."),
        "versions": versions,
    }


def _device_name(session: Session) -> str:
    if session.device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(session.device))
    return str(session.device.type)


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, so that a reader never sees half of it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all: staged, flushed to the disk, renamed."""
    staged = path.with_name(f".{path.name}.tmp")
    try:
        staged.unlink(missing_ok=True)
        files.write(staged, [text.encode()])
        os.replace(staged, path)
        files.flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def clear_litter(folder: Path) -> None:
    """Removes what a killed run had staged; call it only while holding the run's lock."""
    checkpoints.sweep(folder / "checkpoints")
    for path in folder.glob(".*"):
        if path.suffix == ".tmp" and path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir() and path.name.startswith((".adapter.", ".model.", ".merged.")):
            shutil.rmtree(path, ignore_errors=True)


# -- resuming ------------------------------------------------------------------------------------------------------

NOT_LEARNED_FROM = (
    "output_dir", "tracking", "evaluation", "export", "training.max_time", "training.keep_checkpoints",
    "training.log_every",
)  # fmt: skip
"""Recipe fields that may differ between a run and its continuation: the trained weights do not depend on them."""


def fingerprints(recipe: Recipe, *, data: str, tokenizer: str, base: str, world_size: int) -> dict[str, Any]:
    """What the continuation of a run must share with it."""
    fields = {
        name: value
        for name, value in flat(recipe)
        if not any(name == skipped or name.startswith(f"{skipped}.") for skipped in NOT_LEARNED_FROM)
    }
    return {"data": data, "tokenizer": tokenizer, "base model": base, "world_size": world_size, "recipe": fields}


def resumable(folder: Path, current: Mapping[str, Any], allow: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None: from the start), and lines about what is not as it was.

    Corrupt checkpoints are named and set aside; changed versions and devices, with which the last bits may differ, are
    named. A run whose training is done ends with the weights of its best step: where their checkpoint is damaged, they
    are trained again. Call it only while holding the run's lock.

    Raises:
        RunError: something that the weights depend on has changed and is not allowed by name.
    """
    clear_litter(folder)
    checkpoint, said = checkpoints.newest(folder / "checkpoints")
    lost = _lost_best(checkpoint) if checkpoint else None
    if lost:
        checkpoint, more = checkpoints.newest(folder / "checkpoints", before=lost[0])
        said += [lost[1], *more]
    if checkpoint is None:
        checkpoints.set_aside(folder / "checkpoints", None)
        return None, [*said, f"{folder} has no checkpoint to go on from: training starts from the beginning"]
    try:
        changed = changes(checkpoint.state()["fingerprints"], current)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{checkpoint.path} was not written by this version of peftkit ({error!r})") from None
    refused = {name: how for name, how in changed.items() if not any(_covers(given, name) for given in allow)}
    if refused:
        listed = "; ".join(f"{name}{how}" for name, how in refused.items())
        first = next(iter(refused)).replace(" ", "_")
        raise RunError(
            f"{folder} cannot be resumed: since its checkpoint these changed: {listed}. Undo the change, start a new "
            f"run, or allow it by name: --allow {first}"
        )
    checkpoints.set_aside(folder / "checkpoints", checkpoint)
    return checkpoint, said


def _lost_best(checkpoint: Checkpoint) -> tuple[int, str] | None:
    """The best step of a run whose training is done, and what has become of its checkpoint; None where it is whole."""
    state = checkpoint.state()
    best = state.get("training", {}).get("best_step") if state.get("finished") else None
    if best is None or best == checkpoint.step:
        return None
    try:
        checkpoints.at_step(checkpoint.path.parent, best)
    except CheckpointError as error:
        return best, f"{error}; it held the best weights, which are trained again"
    return None


def other_surroundings(folder: Path, session: Session) -> list[str]:
    """A line about versions, device and threads that are not those of the run so far: bits may differ, no more."""
    try:
        before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        now = environment(session)
        old = {**before["versions"], **{name: before[name] for name in SURROUNDINGS}}
        new = {**now["versions"], **{name: now[name] for name in SURROUNDINGS}}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    changed = [
        f"{name} {old.get(name)} → {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]
    return [f"not as before the interruption: {', '.join(changed)}; the last bits may differ"] if changed else []


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Name → `` (old → new)`` of whatever differs."""
    found = {}
    for name in ("data", "tokenizer", "base model", "world_size"):
        if saved.get(name) != current.get(name):
            found[name] = f" ({saved[name]} → {current[name]})" if name == "world_size" else ""
    old, new = saved["recipe"], current["recipe"]
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            found[name] = f" ({old.get(name)} → {new.get(name)})"
    return found


def _covers(given: str, name: str) -> bool:
    given = given.replace("_", " ") if given == "base_model" else given
    return name == given or name.startswith(f"{given}.")
