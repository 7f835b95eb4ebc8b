"""Base classes of the methods that peft implements, and the selection of the modules that they adapt."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.schema.method import Method
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import nn

NO_TARGET = "dummy-target-modules"
"""peft's name for an adapter without target modules; modules saved in full still travel with it."""
MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which peft refuses to adapt ``out_proj``."""
Patterns = str | tuple[str, ...]


def _check_names(value: Patterns | None) -> Patterns | None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}") from None
    elif value is not None and not value:
        raise ValueError("expected at least one module name, found none")
    return value


ModuleNames = Annotated[Patterns, AfterValidator(_check_names)]
"""all-linear, names of modules, or one regular expression that matches full module names."""
BlockNumbers = int | tuple[Annotated[int, Field(ge=0)], ...]  # numbers of blocks from 0, or -2 for the last two
Fraction = Annotated[float, Field(ge=0, lt=1)]


class PeftMethod(Method):
    """A method that peft implements."""

    @abstractmethod
    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's configuration of this method for this model; raises MethodError where it does not fit."""

    def apply(self, loaded: LoadedModel) -> None:
        """Wraps the model with peft; raises MethodError with peft's reason where peft refuses."""
        from peft import get_peft_model

        config = self.peft_config(loaded)
        try:
            loaded.model = get_peft_model(loaded.model, config)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            name = type(loaded.model).__name__
            raise MethodError(f"method.kind={self.kind} cannot be applied to {name}: {reason}") from error

    def shared_arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """The arguments that all peft configurations take: the task, and the head, which is trained in full."""
        return {"task_type": task_type(loaded), "modules_to_save": list(loaded.head_names) or None}


class LinearLayerMethod(PeftMethod):
    """A method that adapts linear layers, selected by name, pattern and block."""

    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ("bitsandbytes",)

    target_modules: ModuleNames = "all-linear"
    """all-linear, names of modules (query, or encoder.layer.0.attention.self.query), or one regular expression that
    matches full module names. The head is never adapted: it is trained in full."""
    exclude_modules: ModuleNames | None = None
    """Modules to leave out: names, or one regular expression."""
    layers: BlockNumbers | None = None
    """Blocks to adapt: their numbers from 0, or -2 for the last two; None for all."""

    def shared_arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """Those of every method, and the full names of the target modules."""
        chosen = (self.target_modules, self.exclude_modules, self.layers)
        targets = choose_targets(loaded.model, loaded.head_names, *chosen)
        return {**super().shared_arguments(loaded), "target_modules": targets}


def task_type(loaded: LoadedModel) -> str | None:
    """peft's name for what the model does; None where it has no wrapper of its own for it."""
    kinds = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return kinds.get(loaded.auto_class.removeprefix("AutoModelFor"))


def in_head(name: str, head_names: Collection[str]) -> bool:
    """Whether a module or parameter of that full name belongs to the head."""
    return not set(head_names).isdisjoint(name.split("."))


def choose_targets(
    model: nn.Module, head_names: tuple[str, ...], target_modules: Patterns, exclude_modules: Patterns | None = None,
    layers: int | tuple[int, ...] | None = None,
) -> list[str]:  # fmt: skip
    """Full names of the layers to adapt; raises MethodError where a name, a pattern or a block matches nothing."""
    names = linear_names(model, head_names)
    targets = match_modules("target_modules", target_modules, names)
    if exclude_modules is not None:
        excluded = set(match_modules("exclude_modules", exclude_modules, names))
        targets = [name for name in targets if name not in excluded]
    if layers is not None:
        prefixes = tuple(f"{block}." for block in choose_blocks(model, layers))
        targets = [name for name in targets if name.startswith(prefixes)]
    if not targets:
        raise MethodError(
            "method: target_modules, exclude_modules and layers together leave no module to adapt; loosen one of them"
        )
    return targets


def choose_blocks(model: nn.Module, layers: int | tuple[int, ...] | None) -> list[str]:
    """Full names of the transformer blocks that ``layers`` selects (None: all); raises MethodError if out of range."""
    from peftkit.models.blocks import find_blocks

    prefix, blocks = find_blocks(model)
    count = len(blocks)
    numbers: tuple[int, ...] = layers if isinstance(layers, tuple) else tuple(range(count))
    if isinstance(layers, int):
        numbers = tuple(range(count + layers, count)) if layers < 0 else (layers,)
    if not numbers or any(not 0 <= number < count for number in numbers):
        raise MethodError(f"method.layers={layers}: the model has {count} blocks, numbered 0 to {count - 1}")
    return [f"{prefix}.{number}" for number in dict.fromkeys(numbers)]


def linear_names(model: nn.Module, head_names: Collection[str] = ()) -> list[str]:
    """Full names of the linear layers outside the head, without the output embeddings.

    GPT-2's Conv1D counts as linear, and so do the layers of GPTQ and AWQ checkpoints. Not so layers that compute
    something else than a matmul (routers of experts, grouped matmuls), nor ``out_proj`` of Mamba models, whose weight
    their kernels use without calling the layer: peft refuses it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    packed = ("qweight", "in_features", "out_features")  # classes of GPTQ and AWQ share no base class with torch's
    bypassed = ".out_proj" if getattr(getattr(model, "config", None), "model_type", None) in MAMBA else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or all(hasattr(module, attribute) for attribute in packed)
        if module is not output and not in_head(name, head_names) and not _computes_more(module)
        if bypassed is None or not name.endswith(bypassed)
    ]


def _computes_more(module: nn.Module) -> bool:
    """Whether an architecture's own subclass of a linear layer replaces its forward pass."""
    from torch import nn

    cls = type(module)
    own = isinstance(module, nn.Linear) and cls.__module__.startswith("transformers.models.")
    return own and cls.forward is not nn.Linear.forward and cls.__name__ != "FalconLinear"  # which adds bias later


def match_modules(field: str, patterns: Patterns, names: list[str]) -> list[str]:
    """The names that a field of the recipe selects, in the model's order; raises MethodError if one selects nothing."""
    if patterns == "all-linear":
        return names
    matches: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        chosen = {name for name in names if f".{name}".endswith(f".{pattern}")}
        if isinstance(patterns, str):
            chosen |= {name for name in names if re.fullmatch(pattern, name)}
        if not chosen:
            raise MethodError(f"method.{field}: '{pattern}' matches no linear module; {suggest(pattern, names)}")
        matches |= chosen
    return [name for name in names if name in matches]


def check_patterns(field: str, patterns: Mapping[str, object], targets: list[str]) -> None:
    """Raises MethodError for a pattern that matches no adapted module."""
    for pattern in patterns:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in targets):
            raise MethodError(f"method.{field}: '{pattern}' matches no adapted module; {suggest(pattern, targets)}")


def suggest(pattern: str, names: list[str]) -> str:
    """Names the nearest module, comparing as many trailing parts of each name as the pattern has."""
    parts = pattern.count(".") + 1
    known = {".".join(name.split(".")[-parts:]) for name in names}
    return did_you_mean(pattern, {name for name in known if not name[:1].isdigit()} or known)


def fan_in_fan_out(model: nn.Module, targets: list[str]) -> bool:
    """peft's name for weights stored as [in, out]: whether the targets are GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(targets[0]), Conv1D)
