"""Bottleneck adapters on the residual branches of transformer blocks.

    sequential  h ← h + s · (W_up f(W_down h + b) + b')      h: output of a branch
    parallel    h ← h + s · (W_up f(W_down x + b) + b')      x: input of the branch

An adapter is a separate module in its block, connected by hooks, so that the base keeps its modules, parameter names
and quantization. H is the width of the residual stream, D the width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkit.methods.layers.residual import Branch

NAME = "bottleneck_adapters"  # name of the module of a block that contains its adapters
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip
NEAR_ZERO = 1e-2
"""Standard deviation of Houlsby et al.'s initialization, a normal distribution truncated at two deviations."""


@dataclass(frozen=True)
class AdapterShape:
    """Everything about an adapter except its weights."""

    branch: Branch
    size: int  # D
    nonlinearity: str = "relu"
    scaling: float | str = 1.0  # s, or "learned": a trained scalar that starts at 1
    dropout: float = 0.0
    parallel: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AdapterShape:
        """The shape from the values of ``asdict``; raises TypeError or KeyError for anything else."""
        return cls(**{**values, "branch": Branch(**values["branch"])})


class BottleneckAdapter(nn.Module):
    """One adapter: down-projection, nonlinearity, dropout, up-projection, scale."""

    def __init__(self, shape: AdapterShape, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.down = nn.Linear(shape.branch.width, shape.size, device=device)
        self.up = nn.Linear(shape.size, shape.branch.width, device=device)
        learned = shape.scaling == "learned"
        self.scaling: Any = nn.Parameter(torch.ones((), device=device)) if learned else shape.scaling
        self.handles: list[RemovableHandle] = []
        self._input: Tensor | None = None

    def initialize(self, init: str) -> None:
        """zero: W_up is 0 and W_down Kaiming-uniform; normal: both are near 0. The biases are 0."""
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=NEAR_ZERO, a=-2 * NEAR_ZERO, b=2 * NEAR_ZERO)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """s · (W_up f(W_down x + b) + b'), [..., H] in the dtype of x."""
        inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        hidden = NONLINEARITIES[self.shape.nonlinearity](self.down(inputs))
        hidden = F.dropout(hidden, self.shape.dropout, self.training)
        return (self.up(hidden) * self.scaling).to(x.dtype)

    def save_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the branch's first module: saves the branch's input until the branch ends."""
        self._input = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def add_to_branch(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook of the branch's last module: branch + adapter."""
        if not self.shape.parallel:
            return output + self(output)
        assert self._input is not None
        x, self._input = self._input, None
        return output + self(x).to(output.dtype).view(output.shape)


def insert(model: nn.Module, shapes: Sequence[AdapterShape], init: str = "zero") -> None:
    """Inserts adapters, in fp32 and on their blocks' devices; AttributeError where the model lacks their modules."""
    for shape in shapes:
        block = model.get_submodule(shape.branch.block)
        device = next(block.parameters()).device
        adapter = BottleneckAdapter(shape, device)
        adapter.initialize(init)
        adapter.train(block.training)
        if not hasattr(block, NAME):
            block.add_module(NAME, nn.ModuleDict())
        block.get_submodule(NAME).add_module(shape.branch.kind, adapter)
        adapter.handles.append(model.get_submodule(shape.branch.exit).register_forward_hook(adapter.add_to_branch))
        if shape.parallel:
            entry = model.get_submodule(shape.branch.entry)
            adapter.handles.append(entry.register_forward_pre_hook(adapter.save_input, with_kwargs=True))


def remove(model: nn.Module) -> None:
    """Removes every adapter, which restores the base model."""
    for adapter in adapters(model):
        for handle in adapter.handles:
            handle.remove()
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), nn.ModuleDict):
            delattr(module, NAME)


def adapters(model: nn.Module) -> list[BottleneckAdapter]:
    """The adapters of a model."""
    return [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
