"""Where training stands: all that a checkpoint must carry besides tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """Everything here continues on resume."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next step."""
    batch: int = 0
    """Place of the next step in its epoch's plan."""
    evaluated: int = -1
    """Last step that was validated; a run stopped before or in a validation makes up for it."""
    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the last improvement (early stopping)."""
    stopped_early: bool = False
    skipped: int = 0
    """Steps without an update because of numbers that were not finite."""
    seconds: float = 0.0
    """Time spent training, validations and checkpoints not counted."""
    rows: int = 0
    tokens: int = 0
    log_offset: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of the log."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingState:
        """The state that ``to_json`` gave."""
        return cls(**values)
