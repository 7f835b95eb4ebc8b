"""The selection of the modules that a method adapts: by name, pattern and block."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods import auto_layers
from peftkit.schema.automatic import reads
from peftkit.schema.types import in_head

if TYPE_CHECKING:
    from torch import nn

MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which peft refuses to adapt ``out_proj``."""
ALL_LINEAR = "all-linear"
"""The pattern of every linear layer outside the head."""
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
Layers = Annotated[
    BlockNumbers | Literal["auto"] | auto_layers.AutoLayers | None,
    reads(auto_layers.AutoLayers, "auto, -2 for the last two blocks, or numbers of blocks such as [0, 1]"),
]
"""Blocks to adapt as a recipe names them: by number, all (None), or chosen by the run (auto)."""
Fraction = Annotated[float, Field(ge=0, lt=1)]


def choose_targets(
    model: nn.Module, head_names: tuple[str, ...], target_modules: Patterns, exclude_modules: Patterns | None = None,
    layers: Layers = None,
) -> list[str]:  # fmt: skip
    """Full names of the layers to adapt; raises MethodError where a name, a pattern or a block matches nothing."""
    names = linear_names(model, head_names)
    weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    targets = match_modules("target_modules", target_modules, names, weights)
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


def choose_blocks(model: nn.Module, layers: Layers) -> list[str]:
    """Full names of the transformer blocks that ``layers`` selects (None: all); raises MethodError if out of range."""
    from peftkit.models.blocks import find_blocks

    assert layers is None or isinstance(layers, (int, tuple)), "automatic layers are chosen before the model is built"
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
        if not name.startswith("pooler.")  # of a backbone without a head, whose hidden states are read instead
    ]


def _computes_more(module: nn.Module) -> bool:
    """Whether an architecture's own subclass of a linear layer replaces its forward pass."""
    from torch import nn

    cls = type(module)
    own = isinstance(module, nn.Linear) and cls.__module__.startswith("transformers.models.")
    return own and cls.forward is not nn.Linear.forward and cls.__name__ != "FalconLinear"  # which adds bias later


def match_modules(field: str, patterns: Patterns, names: list[str], weights: Collection[str] = ()) -> list[str]:
    """The names that a field of the recipe selects, in the model's order; raises MethodError if one selects nothing.

    Args:
        names: of the modules to choose from.
        weights: names of all weights, for the error about a name that only a weight of its own has.
    """
    if patterns == ALL_LINEAR:
        return names
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else [(name,) for name in patterns]:
        selected = {name for name in names if matches(pattern, name)}
        if not selected:
            text = pattern if isinstance(pattern, str) else pattern[0]
            own = [weight for weight in weights if matches(pattern, weight)]
            advice = _adapt_weights(own) if own else suggest(text, names)
            raise MethodError(f"method.{field}: '{text}' matches no linear module; {advice}")
        chosen |= selected
    return [name for name in names if name in chosen]


def _adapt_weights(weights: list[str]) -> str:
    """What to do where a name is that of weights outside of linear layers."""
    names = ", ".join(dict.fromkeys(".".join(weight.split(".")[-2:]) for weight in weights))
    return (
        f"it is the name of weights that belong to none, such as {weights[0]}: to adapt them with LoRA, set method to "
        f"{{kind: peft, peft_type: LORA, arguments: {{target_parameters: [{names}]}}}}"
    )


def matches(patterns: Patterns, name: str) -> bool:
    """Whether a full name ends in one of the names, or is matched by the one regular expression."""
    if isinstance(patterns, str):
        return f".{name}".endswith(f".{patterns}") or re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)


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
