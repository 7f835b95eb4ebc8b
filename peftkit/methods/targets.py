"""Which modules a method works on, and the way from a method to peft: shared by the families that peft carries out."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.schema.method import Method
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import nn


def _readable(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}") from None
    elif value is not None and not value:
        raise ValueError("expected at least one module name, found none")
    return value


Names = Annotated[str | tuple[str, ...], AfterValidator(_readable)]
"""all-linear, names of modules, or one regular expression over whole module names."""
Blocks = int | tuple[Annotated[int, Field(ge=0)], ...]
"""Numbers of blocks from 0, or -2 for the last two."""
Rate = Annotated[float, Field(ge=0, lt=1)]


class PeftMethod(Method):
    """A method that peft carries out."""

    @abstractmethod
    def config(self, loaded: LoadedModel) -> Any:
        """peft's configuration of this method for this model; raises MethodError where it does not fit."""

    def apply(self, loaded: LoadedModel) -> None:
        """Lets peft put its modules in place; raises MethodError with peft's reason where it refuses."""
        wrap(loaded, self.config(loaded), self.kind)


class LinearLayerMethod(PeftMethod):
    """A method over linear layers that are chosen by name, pattern and block."""

    packed: ClassVar[tuple[str, ...] | None] = ("bitsandbytes",)

    target_modules: Names = "all-linear"
    """all-linear, names of modules (query, or encoder.layer.0.attention.self.query), or one regular expression over
    whole module names. The head is never among them: it is trained in full."""
    exclude_modules: Names | None = None
    """Names of modules, or one regular expression, taken out of the targets."""
    layers: Blocks | None = None
    """Blocks that are adapted: their numbers from 0, or -2 for the last two; None for all."""

    def shared(self, loaded: LoadedModel) -> dict[str, Any]:
        """The arguments that peft's configurations of such methods share."""
        targets = choose_targets(
            loaded.model, loaded.head_names, self.target_modules, self.exclude_modules, self.layers
        )
        return {
            "task_type": task_type(loaded),
            "target_modules": targets,
            "modules_to_save": list(loaded.head_names) or None,
        }


def wrap(loaded: LoadedModel, config: Any, kind: str) -> None:
    """Replaces ``loaded.model`` by peft's wrapper; raises MethodError with peft's reason where it refuses."""
    from peft import get_peft_model

    try:
        loaded.model = get_peft_model(loaded.model, config)
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
        name = type(loaded.model).__name__
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MethodError(f"method.kind={kind} cannot be put into {name}: {said}") from error


def task_type(loaded: LoadedModel) -> str | None:
    """peft's name for what the model does; None where it has no wrapper of its own for it."""
    kinds = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return kinds.get(loaded.auto_class.removeprefix("AutoModelFor"))


def choose_targets(
    model: nn.Module,
    heads: tuple[str, ...],
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] | None = None,
    layers: int | tuple[int, ...] | None = None,
) -> list[str]:
    """Full names of the layers to adapt; raises MethodError where a name, a pattern or a layer matches nothing."""
    names = [name for name in linear_names(model) if not set(name.split(".")) & set(heads)]
    chosen = choose("target_modules", target_modules, names)
    if exclude_modules is not None:
        out = set(choose("exclude_modules", exclude_modules, names))
        chosen = [name for name in chosen if name not in out]
    if layers is not None:
        inside = _block_prefixes(model, layers)
        chosen = [name for name in chosen if name.startswith(inside)]
    if not chosen:
        raise MethodError("method: target_modules, exclude_modules and layers together leave no module to adapt")
    return chosen


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers (GPT-2's Conv1D and packed ones among them), output embeddings left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output else None
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, Conv1D)) or _is_packed(module)) and module is not output
    ]


def _is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer of a GPTQ or AWQ checkpoint, whose classes share no base with torch's."""
    return hasattr(module, "qweight") and hasattr(module, "in_features") and hasattr(module, "out_features")


def choose(field: str, wanted: str | tuple[str, ...], names: list[str]) -> list[str]:
    """The names that are wanted, in the model's order; raises MethodError where one matches nothing."""
    if wanted == "all-linear":
        return names
    if isinstance(wanted, str):
        chosen = [name for name in names if re.fullmatch(wanted, name) or _is_suffix(wanted, name)]
        if not chosen:
            raise MethodError(f"method.{field}: '{wanted}' matches no linear module; {nearest(wanted, names)}")
        return chosen
    for one in wanted:
        if not any(_is_suffix(one, name) for name in names):
            raise MethodError(f"method.{field}: '{one}' matches no linear module; {nearest(one, names)}")
    return [name for name in names if any(_is_suffix(one, name) for one in wanted)]


def nearest(wanted: str, names: list[str]) -> str:
    """Compares with as many steps of the module names as were written; block numbers tell nothing."""
    steps = wanted.count(".") + 1
    known = {".".join(name.split(".")[-steps:]) for name in names}
    return did_you_mean(wanted, {name for name in known if not name[:1].isdigit()} or known)


def check_patterns(field: str, patterns: Mapping[str, object], targets: list[str]) -> None:
    """Raises MethodError for a pattern that matches no adapted module."""
    for pattern in patterns:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in targets):
            raise MethodError(f"method.{field}: '{pattern}' matches no adapted module; {nearest(pattern, targets)}")


def transposed(model: nn.Module, targets: list[str]) -> bool:
    """Whether the targets are Conv1D, which keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(targets[0]), Conv1D)


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _block_prefixes(model: nn.Module, layers: int | tuple[int, ...]) -> tuple[str, ...]:
    from peftkit.models.blocks import find_blocks

    prefix, blocks = find_blocks(model)
    count = len(blocks)
    wanted = layers if isinstance(layers, tuple) else (layers,)
    if isinstance(layers, int) and layers < 0:
        wanted = tuple(range(count + layers, count))
    wrong = [number for number in wanted if not 0 <= number < count]
    if wrong or not wanted:
        raise MethodError(f"method.layers={layers}: the model has {count} blocks, numbered 0 to {count - 1}")
    return tuple(f"{prefix}.{number}." for number in wanted)
