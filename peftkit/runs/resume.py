"""Resume checks: which checkpoint a run resumes from, and what must not have changed since it was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import CheckpointError, RunError
from peftkit.runs import checkpoints, folder
from peftkit.runs.checkpoints import Checkpoint
from peftkit.schema.recipe import Recipe, flatten

NOT_LEARNED_FROM = (
    "output_dir", "tracking", "evaluation", "export", "training.max_time", "training.keep_checkpoints",
    "training.log_every", "model.offload",
)  # fmt: skip
"""Recipe fields that may change when a run is resumed: the trained weights do not depend on them."""


def fingerprints(
    recipe: Recipe, *, data: str, tokenizer: str, base: str, world_size: int, adapter: str = ""
) -> dict[str, Any]:
    """What a resumed run must share with the one that stopped; stored in every checkpoint.

    ``adapter`` is the digest of the one that training started from.
    """
    fields = {name: value for name, value in flatten(recipe).items() if not _covered(name, NOT_LEARNED_FROM)}
    return {
        "data": data,
        "tokenizer": tokenizer,
        "base model": base,
        "adapter": adapter,
        "world_size": world_size,
        "recipe": fields,
    }


def find_checkpoint(
    run: Path, current: Mapping[str, Any], allow: tuple[str, ...]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from (None: start from the beginning), and a note about each that cannot be used.

    A finished run ends with the weights of its best step: if their checkpoint is damaged, they are trained again from
    the one before it. Checkpoints after the chosen one are renamed. Requires the run's lock.

    Raises:
        RunError: something that the weights depend on has changed, and ``allow`` does not name it.
    """
    folder.remove_staged(run)
    root = run / "checkpoints"
    checkpoint, notes = checkpoints.newest(root)
    if checkpoint and (damaged := _damaged_best(checkpoint)):
        step, note = damaged
        checkpoint, more = checkpoints.newest(root, before=step)
        notes += [note, *more]
    if checkpoint is None:
        checkpoints.set_aside(root, None)
        return None, [*notes, f"{run} has no checkpoint to resume from: training starts from the beginning"]
    try:
        changed = _changes(checkpoint.state()["fingerprints"], current)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{checkpoint.path} was not written by this version of peftkit ({error!r})") from None
    allowed = [name.replace("_", " ") if name == "base_model" else name for name in allow]
    refused = {name: values for name, values in changed.items() if not _covered(name, allowed)}
    if refused:
        listed = "; ".join(f"{name}{values}" for name, values in refused.items())
        first = next(iter(refused)).replace(" ", "_")
        raise RunError(
            f"{run} cannot be resumed: since its checkpoint these changed: {listed}. Undo the change, start a new "
            f"run, or allow it by name: --allow {first}"
        )
    checkpoints.set_aside(root, checkpoint)
    return checkpoint, notes


def _damaged_best(checkpoint: Checkpoint) -> tuple[int, str] | None:
    """The best step of a finished run and what is wrong with its checkpoint; None if nothing is."""
    state = checkpoint.state()
    best = state.get("training", {}).get("best_step") if state.get("finished") else None
    if best is None or best == checkpoint.step:
        return None
    try:
        checkpoints.at_step(checkpoint.path.parent, best)
    except CheckpointError as error:
        return best, f"{error}; it held the best weights, which are trained again"
    return None


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Whatever differs, as name → `` (old → new)``; empty values for fingerprints."""
    changed = {}
    for name in ("data", "tokenizer", "base model", "adapter", "world_size"):
        if (saved.get(name) or None) != (current.get(name) or None):
            changed[name] = f" ({saved[name]} → {current[name]})" if name == "world_size" else ""
    old, new = saved["recipe"], current["recipe"]
    for name in sorted(set(old) | set(new)):
        added_since = name not in old and not new[name]  # a field that came later is off by default
        if old.get(name) != new.get(name) and not added_since:
            changed[name] = f" ({old.get(name)} → {new.get(name)})"
    return changed


def _covered(name: str, parts: list[str] | tuple[str, ...]) -> bool:
    """Whether a field is one of ``parts``, or lies in one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)
