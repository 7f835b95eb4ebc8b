"""Search spaces: ``part.field=SPEC``, checked against the recipe's schema before anything is trained.

    training.learning_rate=1e-5..1e-2:log     a range, searched by its logarithm
    method.rank=4,8,16                        choices
    training.epochs=1..5                      integers, as both ends are; write 0.0..0.5 for fractions
    training.batch_size=8..64:step=8          every eighth

A YAML file contains the same, one line per field: ``training.epochs: 1..5`` or ``method.rank: [4, 8, 16]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import RecipeError, did_you_mean
from peftkit.experiments.variants import has_field, with_values
from peftkit.schema.overrides import is_swap
from peftkit.schema.recipe import Recipe
from peftkit.schema.recipe_yaml import value_of

SEARCHED_DATA = ("data.max_length", "data.augmentation")
"""Data fields that may vary; all others would change the rows that trials are scored on."""
NOT_SEARCHED = {
    **dict.fromkeys(("name", "output_dir", "tracking", "evaluation", "export"), "it does not affect learning"),
    "training.seed": "the best of several seeds is chance; measure it with compare --seeds",
    "training.best_metric": "trials are judged by one figure: --metric",
}


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    probes = grid


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it consists of whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step or 1, int)

    def grid(self) -> tuple[Any, ...]:
        """All values; raises RecipeError for a range without a step, of which there is no end."""
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            raise RecipeError("a grid has no end here: list the values, or give a step, such as 0.0..0.5:step=0.1")
        count = int((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.low + number * step for number in range(count))

    def probes(self) -> tuple[Any, ...]:
        """Values that must be allowed: both ends, and a fraction between them where fractions are drawn."""
        between = () if self.whole else (self.low + 0.37 * (self.high - self.low),)
        return (self.low, self.high, *between)


Dimension = Choices | Range
Space = dict[str, Dimension]


def parse(given: Mapping[str, Any] | Sequence[str], recipe: Recipe) -> Space:
    """The space, its swaps of whole parts first.

    Args:
        given: texts ``part.field=SPEC``, YAML files of them, or a mapping of fields to texts or lists.
        recipe: what the values are checked against, one at a time.

    Raises:
        RecipeError: naming the field and, where it is misspelt, the nearest.
    """
    items = list(given.items()) if isinstance(given, Mapping) else [item for text in given for item in _read(text)]
    if not items:
        raise RecipeError("--space: expected at least one, such as --space 'training.learning_rate=1e-5..1e-2:log'")
    space: Space = {}
    for path, spec in items:
        if path in space:
            raise RecipeError(f"--space {path}: is there already; give it once")
        _refuse_unsearched(path)
        space[path] = _dimension(path, spec)
    ordered = dict(sorted(space.items(), key=lambda item: not is_swap(item[0])))
    for path, dimension in ordered.items():
        _check(path, dimension, ordered, recipe)
    return ordered


def _read(text: str) -> Iterable[tuple[str, Any]]:
    path, equals, spec = (piece.strip() for piece in text.partition("="))
    if equals and path and spec:
        return [(path, spec)]
    file = Path(text)
    if file.suffix not in {".yaml", ".yml"}:
        raise RecipeError(f"--space {text}: expected part.field=SPEC, such as method.rank=4,8,16, or a .yaml file")
    try:
        fields = value_of(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{file}: expected one line per field, such as method.rank: [4, 8, 16]")
    return [(str(key), value) for key, value in fields.items()]


def _dimension(path: str, spec: Any) -> Dimension:
    if isinstance(spec, (list, tuple)):
        return _choices(path, list(spec))
    low_text, dots, rest = str(spec).strip().partition("..")
    high_text, *option_texts = rest.split(":")
    if not dots or "," in str(spec):
        try:
            return _choices(path, value_of(f"[{spec}]"))
        except (yaml.YAMLError, RecursionError):
            raise RecipeError(f"--space {path}: '{spec}' is neither a range (1..8) nor values (1,2,4)") from None
    low, high = _number(path, low_text), _number(path, high_text)
    options = dict(_option(path, text) for text in option_texts)
    if not low < high:
        raise RecipeError(f"--space {path}: expected the smaller number first, found {spec}")
    if options.get("log") and (low <= 0 or "step" in options):
        raise RecipeError(f"--space {path}: a log range starts above 0 and has no step, found {spec}")
    return Range(low, high, bool(options.get("log")), options.get("step"))


def _choices(path: str, values: list[Any]) -> Choices:
    if len(values) < 2:
        raise RecipeError(f"--space {path}: expected two values or more, found {values}; or a range such as 1e-5..1e-2")
    return Choices(tuple(values))


def _number(path: str, text: str) -> Any:
    value = value_of(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"--space {path}: '{text.strip()}' is not a number")
    return value


def _option(path: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.strip().partition("=")
    if name == "log" and not equals:
        return "log", True
    if name == "step" and equals:
        step = _number(path, value)
        if step > 0:
            return "step", step
    raise RecipeError(f"--space {path}: '{text}': {did_you_mean(name, ('log', 'step'))} (log, or step=NUMBER above 0)")


def _refuse_unsearched(path: str) -> None:
    for name, why in NOT_SEARCHED.items():
        if path == name or path.startswith(f"{name}."):
            raise RecipeError(f"--space {path}: cannot be searched: {why}")
    kind_of_task = path in {"task", "task.kind"} or path.startswith("model.source")
    if (path.startswith("data.") and not path.startswith(SEARCHED_DATA)) or kind_of_task:
        raise RecipeError(f"--space {path}: cannot be searched: trials would be scored on other rows or metrics")


def _check(path: str, dimension: Dimension, space: Space, recipe: Recipe) -> None:
    """Tries every choice, or both ends of a range; a field of a swapped section on the kinds that have it."""
    bases = [recipe]
    for swap, kinds in space.items():
        if is_swap(swap) and swap != path and swap.partition(".")[0] == path.partition(".")[0]:
            bases = [with_values(recipe, {swap: kind}) for kind in kinds.probes()]
    fitting = [base for base in bases if has_field(base, path)] or bases[:1]
    for base in fitting:
        for value in dimension.probes():
            try:
                with_values(base, {path: value})
            except RecipeError as error:
                message = str(error).partition(": ")[2] if str(error).startswith("override ") else str(error)
                hint = "; write 4..16 for integers" if "integer" in message and isinstance(dimension, Range) else ""
                raise RecipeError(f"--space {path}: {message}{hint}") from None
