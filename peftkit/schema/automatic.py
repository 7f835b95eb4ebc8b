"""Fields of a method that the run chooses on its own training rows, before training: a recipe writes ``auto``.

Such a field holds an ``Automatic``, which knows how to choose: from gradients of training rows under the widest choice
(``methods``), which the run computes (``training.choosing``). What was chosen replaces it in the run's recipe, so that
everything after that sees a plain number, and is stored in the run's folder with the estimates that it rests on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidatorFunctionWrapHandler, WrapValidator

from peftkit.schema.sections import ConfigSection

if TYPE_CHECKING:
    from peftkit.schema.recipe import Recipe
    from peftkit.schema.types import LoadedModel

AUTO = "auto"


@dataclass(frozen=True)
class Candidate:
    """A value that a field might have had."""

    size: int
    """What the value stands for: number of adapted blocks, or rank."""
    estimate: float
    """Share of what the best candidate is estimated to bring; 0 is training the head alone."""
    error: float
    """Its standard error over the groups of rows."""


@dataclass(frozen=True)
class Choice:
    """What a run chose for a field of its method, and why."""

    field: str
    """``layers``"""
    value: int
    """What the run's recipe has in its place."""
    asked: Mapping[str, Any]
    """The recipe's own value, as JSON."""
    size: int
    """The candidate's size."""
    unit: str
    """What sizes count: ``adapted blocks``."""
    curve: tuple[Candidate, ...]
    """Every candidate, the smallest first."""
    threshold: float
    """The estimate that the recipe's tolerance asks for."""
    summary: str
    """One sentence for the user."""
    rows: int = 0
    """Training rows whose gradients it rests on."""
    seconds: float = 0.0
    """Time that it took."""


class Automatic(ConfigSection):
    """A field's value that is chosen on the training rows."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """The most training rows that the choice may look at."""

    @property
    @abstractmethod
    def widest(self) -> Any:
        """The most that may be chosen: what a plan counts, and what the gradients are taken of."""

    @property
    def probed(self) -> Any:
        """The value whose gradients are looked at."""
        return self.widest

    @property
    @abstractmethod
    def span(self) -> str:
        """What may be chosen, in words."""

    def check(self, field: str, recipe: Recipe) -> None:
        """Raises MethodError where the choice cannot be made; called before anything is loaded."""

    @abstractmethod
    def choose(self, field: str, loaded: LoadedModel, gradients: Iterable[None]) -> Choice:
        """The choice for a field of the name, deterministic given the gradients.

        Args:
            loaded: the model with the widest choice, its head fitted to other training rows.
            gradients: at each step the model's trained parameters have the gradient of the mean loss of another group
                of training rows.
        """


def reads(kind: type[Automatic], expected: str) -> WrapValidator:
    """A validator of a field that may be automatic: ``auto``, a mapping with its options, or what the field is.

    Args:
        expected: of a text that is neither ``auto`` nor a whole number, for the error.
    """

    def read(value: Any, otherwise: ValidatorFunctionWrapHandler) -> Any:
        if value == AUTO:
            return kind()
        if isinstance(value, Mapping):
            return kind.model_validate(value)
        if isinstance(value, str) and not value.lstrip("-").isdigit():
            raise ValueError(f"expected {expected}")
        return otherwise(value)

    return WrapValidator(read)
