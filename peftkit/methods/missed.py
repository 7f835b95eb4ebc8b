"""What a method's selection of weights misses although its kind is meant: remarks for the user, before training.

* weights of two dimensions or more outside of linear layers, which no name in ``target_modules`` can select: the fused
  weights of a mixture's experts, routers, XLNet's projections.
* a name that matches in some blocks only, as in models that mix kinds of attention or of feed-forward layers.
* a weight that several modules share, of which not all are adapted: the others keep the base's weight.

All functions take the model that the method built, and name its modules as the base does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from peftkit.methods.targets import ALL_LINEAR, Layers, Patterns, choose_blocks, linear_names, matches
from peftkit.schema.types import in_head

if TYPE_CHECKING:
    from torch import nn

LISTED = 6
"""Most names in one list of a remark."""
Shapes = Mapping[str, tuple[int, ...]]


def unselectable_weights(
    model: nn.Module, patterns: Patterns, head_names: Collection[str] = (), layers: Layers = None
) -> list[str]:
    """A remark on frozen weights that ``patterns`` mean but cannot select, because they are no linear layers.

    All such weights are meant by ``all-linear``; by a name or an expression those that it matches.

    Args:
        patterns: the recipe's ``target_modules``.
        layers: the blocks that are to be adapted; None for the whole model.
    """
    prefixes = tuple(f"{_base_name(block)}." for block in choose_blocks(model, layers)) if layers is not None else ("",)
    shapes = {
        name: shape
        for name, shape in _other_weights(model, head_names)
        if name.startswith(prefixes) and (patterns == ALL_LINEAR or matches(patterns, name))
    }
    if not shapes:
        return []
    share = sum(map(math.prod, shapes.values())) / sum(parameter.numel() for parameter in model.parameters())
    parameters = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in shapes))
    others = "1 other weight stays" if len(shapes) == 1 else f"{len(shapes)} other weights stay"
    return [
        f"method.target_modules selects linear layers only: {others} frozen ({share:.0%} of "
        f"the parameters): {_grouped(shapes)}. To adapt them with LoRA, set method to "
        f"{{kind: peft, peft_type: LORA, arguments: {{target_parameters: [{parameters}]}}}}"
    ]


def partly_matched(model: nn.Module, patterns: Patterns, head_names: Collection[str] = ()) -> list[str]:
    """Remarks on names of ``target_modules`` that match in some of the transformer blocks only.

    A name with the number of a block is meant for that block, and a regular expression is taken at its word.
    """
    remarks: list[str] = []
    if (stack := _longest_stack(model)) is None:
        return remarks
    prefix, blocks = stack
    layers = _layers_by_block(_base_linear_names(model, head_names), _base_name(prefix))
    for pattern in patterns if isinstance(patterns, tuple) else (patterns,):
        if pattern == ALL_LINEAR or re.search(r"[^\w.-]|\b\d+\b", pattern):
            continue
        others = [n for n in range(len(blocks)) if not any(matches((pattern,), name) for name in layers.get(n, ()))]
        if 0 < len(others) < len(blocks):
            names = dict.fromkeys(name for number in others for name in layers.get(number, ()))
            remarks.append(
                f"method.target_modules: '{pattern}' matches in {len(blocks) - len(others)} of {len(blocks)} blocks. "
                f"The linear layers of block {_listed(map(str, others))} are {_listed(names)}"
            )
    return remarks


def shared_weights(model: nn.Module) -> list[str]:
    """Remarks on adapted modules of a peft model whose weight other modules use without the adapter."""
    adapters = _adapter_names(model)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    remarks: dict[str, None] = {}
    for names in users.values():
        plain = sorted({_base_name(name.rpartition(".")[0]) for name in names if _owner(name, adapters) is None})
        adapted = sorted({_base_name(owner) for name in names if (owner := _owner(name, adapters)) is not None})
        if plain and adapted:
            verbs = ("uses", "keeps") if len(plain) == 1 else ("use", "keep")
            remarks[
                f"only {_listed(adapted)} is adapted: {_listed(plain)} {verbs[0]} the same weight, and {verbs[1]} it "
                "as it was. Merging the adapter would change it for all of them: adapt all of them, or none"
            ] = None
    return list(remarks)


def fused_biases(model: nn.Module, head_names: Collection[str] = ()) -> list[str]:
    """A remark on frozen biases of two dimensions or more, such as those of a mixture's fused experts."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.endswith("bias") and not parameter.requires_grad
        if not in_head(name, head_names)
    }
    return [f"only biases that are vectors are trained; these stay frozen: {_grouped(shapes)}"] if shapes else []


def _other_weights(model: nn.Module, head_names: Collection[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the base's frozen weights that belong to neither a linear layer nor an embedding."""
    from peft.tuners.lora.layer import ParamWrapper
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers, adapters = (nn.Linear, nn.Embedding, Conv1D), _adapter_parts(model)
    adapted = {id(module.get_param()) for module in model.modules() if isinstance(module, ParamWrapper)}
    for path, module in model.named_modules():
        if isinstance(module, layers) or id(module) in adapters or in_head(path, head_names):
            continue
        for name, weight in module.named_parameters(path, recurse=False):
            frozen = not weight.requires_grad and id(weight) not in adapted
            if frozen and weight.ndim > 1 and weight.is_floating_point() and not name.endswith("bias"):
                yield _base_name(name), tuple(weight.shape)


def _base_linear_names(model: nn.Module, head_names: Collection[str]) -> list[str]:
    """The base's linear layers, adapted or not."""
    adapters = _adapter_parts(model)
    names = (name for name in linear_names(model, head_names) if id(model.get_submodule(name)) not in adapters)
    return [_base_name(name) for name in names]


def _longest_stack(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and module of the longest list of modules that is not inside another: blocks, of one kind or of several."""
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    return max(outer.items(), key=lambda stack: len(stack[1]), default=None)


def _layers_by_block(names: Iterable[str], prefix: str) -> dict[int, list[str]]:
    """The names of layers within their block, by its number."""
    layers: dict[int, list[str]] = {}
    for name in names:
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            layers.setdefault(int(number), []).append(rest)
    return layers


def _adapter_parts(model: nn.Module) -> set[int]:
    """Identities of the modules that peft has added to the base's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        id(part)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, child in module.named_children()
        if name != "base_layer"
        for part in child.modules()
    }


def _adapter_names(model: nn.Module) -> set[str]:
    """Full names of peft's wrappers around modules of the base, under every path that leads to one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, wrappers)}


def _owner(name: str, adapters: Collection[str]) -> str | None:
    """The outermost adapter that a parameter belongs to."""
    parts = name.split(".")
    return next((path for end in range(1, len(parts)) if (path := ".".join(parts[:end])) in adapters), None)


def _base_name(name: str) -> str:
    """A name in an adapted model as it was in the base."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def _grouped(shapes: Shapes) -> str:
    """``model.layers.*.mlp.experts.down_proj (2 of [4, 16, 32])``: one group for equal names and shapes."""
    groups = Counter((re.sub(r"\b\d+\b", "*", name), shape) for name, shape in shapes.items())
    return _listed(
        f"{name} ({f'{count} of ' if count > 1 else ''}{list(shape)})" for (name, shape), count in groups.items()
    )


def _listed(texts: Iterable[str]) -> str:
    values = list(texts)
    return ", ".join(values[:LISTED]) + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")
