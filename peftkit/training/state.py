"""The progress of a training run: everything in a checkpoint that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainingState:
    """Progress that is restored on resume."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next step."""
    batch: int = 0
    """Index of the next step's batch in its epoch."""
    evaluated: int = -1
    """Last step that was validated; a run stopped before or during a validation repeats it on resume."""
    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the last improvement, for early stopping."""
    stopped_early: bool = False
    skipped: int = 0
    """Steps without an update because the loss or the gradients were not finite."""
    seconds: float = 0.0
    """Time spent training, without validations and checkpoints."""
    rows: int = 0
    tokens: int = 0
    log_offset: int = 0
    """Bytes of metrics.jsonl."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of the log."""
