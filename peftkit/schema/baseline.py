"""The contract of a baseline: what a result is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.head import Head
    from peftkit.schema.recipe import Recipe


@dataclass(frozen=True)
class BaselineInputs:
    """What is known when baselines are computed: before the first step, on every process alike."""

    recipe: Recipe
    head: Head
    train: Any
    """Canonical rows of the training split, a ``datasets.Dataset``."""
    rows: Any
    """Canonical rows of the split that is scored."""
    tokenizer: PreTrainedTokenizerBase
    base_outputs: Callable[[], dict[str, np.ndarray]]
    """Outputs of the untrained base under the head; of use where the head adds no layers."""
    backbone: Any
    """The untrained base without its head, a transformers model in evaluation mode; in shards where ``sharded``."""
    language_model: Callable[[], Any] | None
    """Loads the base as a language model; None for an encoder."""
    cached: Callable[[str, Sequence[Any], Callable[[], np.ndarray]], np.ndarray]
    """``cached(kind, values, compute)`` computes an array once for the same base and the same JSON-able values."""
    new_layers: tuple[str, ...] = ()
    """Layers of the head that the base lacks, and that are untrained as yet."""
    sharded: bool = False
    """Whether the model is spread over several processes."""


@dataclass(frozen=True)
class BaselineResult:
    """Metrics of a trivial or untrained predictor; empty where it cannot be computed, and ``note`` says why."""

    metrics: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    """In the form of the head's own outputs, for ``Head.compare``; empty where it is not to be compared."""
    rows: np.ndarray | None = None
    """Numbers of the rows that were scored; None for all."""
    note: str = ""


class Baseline(ABC):
    """A predictor that training should beat."""

    @abstractmethod
    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Its result on the scored rows; None where there is no such baseline for the head."""
