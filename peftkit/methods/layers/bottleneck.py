"""Bottleneck adapters on the branches of a transformer's blocks.

    sequential  h ← h + s · W_up f(W_down h + b) + b'        h: what a branch adds to the residual stream
    parallel    h ← h + s · (W_up f(W_down x + b) + b')      x: what the branch reads

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021, arXiv:2110.04366.
An adapter is a module of its own beside a block's modules, and meets them through hooks, so that the base keeps its
modules, its parameters' names and its quantization.

Shape suffixes: H width of the stream, D width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.methods.layers.residual import Branch

NAME = "bottleneck_adapters"
"""Name of the adapters' container in a block."""
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip
NEAR_ZERO = 1e-2
"""Houlsby et al.: weights start at a normal distribution with this deviation, cut off at two of them."""


@dataclass(frozen=True)
class AdapterShape:
    """All that makes one adapter, besides its weights."""

    branch: Branch
    size: int
    """D."""
    nonlinearity: str = "relu"
    scaling: float | str = 1.0
    """s, or "learned": a trained number that starts at 1."""
    dropout: float = 0.0
    parallel: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AdapterShape:
        """The shape that ``to_json`` gave; raises TypeError or KeyError for anything else."""
        return cls(**{**values, "branch": Branch(**values["branch"])})


class BottleneckAdapter(nn.Module):
    """One adapter: down, nonlinearity, dropout, up, scale."""

    def __init__(self, shape: AdapterShape, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.down = nn.Linear(shape.branch.width, shape.size, device=device)
        self.up = nn.Linear(shape.size, shape.branch.width, device=device)
        self.scaling: Any = shape.scaling
        if shape.scaling == "learned":
            self.scaling = nn.Parameter(torch.ones((), device=device))
        self._read: Tensor | None = None

    def start(self, init: str) -> None:
        """zero: W_up and both biases are 0, W_down is Kaiming-uniform; normal: both matrices are near zero."""
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=NEAR_ZERO, a=-2 * NEAR_ZERO, b=2 * NEAR_ZERO)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """s · (W_up f(W_down x + b) + b') in the dtype of x, [..., H]."""
        wide = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        low = NONLINEARITIES[self.shape.nonlinearity](self.down(wide))
        low = F.dropout(low, self.shape.dropout, self.training)
        return (self.up(low) * self.scaling).to(x.dtype)

    def read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook on the module that the branch begins with: keeps what it reads until the branch ends."""
        self._read = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def add(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook on the module that the branch ends with: its output with the adapter's added."""
        if not self.shape.parallel:
            return output + self(output)
        assert self._read is not None
        read, self._read = self._read, None
        return output + self(read).to(output.dtype).view(output.shape)

    def extra_repr(self) -> str:
        return f"{self.shape.nonlinearity}, {'parallel' if self.shape.parallel else 'sequential'}"


def insert(model: nn.Module, shapes: Sequence[AdapterShape], init: str = "zero") -> list[str]:
    """Puts adapters into a model's blocks, in fp32 and on their blocks' devices; returns their names.

    Raises:
        AttributeError: the model has no module of a name in ``shapes``.
    """
    names = []
    for shape in shapes:
        block = model.get_submodule(shape.branch.block)
        device = next(block.parameters()).device
        adapter = BottleneckAdapter(shape, device)
        adapter.start(init)
        adapter.train(block.training)
        if not hasattr(block, NAME):
            block.add_module(NAME, nn.ModuleDict())
        block.get_submodule(NAME).add_module(shape.branch.kind, adapter)
        handles = [model.get_submodule(shape.branch.exit).register_forward_hook(adapter.add)]
        if shape.parallel:
            entry = model.get_submodule(shape.branch.entry)
            handles.append(entry.register_forward_pre_hook(adapter.read, with_kwargs=True))
        adapter.handles = handles  # type: ignore[assignment]
        names.append(f"{shape.branch.block}.{NAME}.{shape.branch.kind}")
    return names


def remove(model: nn.Module) -> None:
    """Takes every adapter out again; the model is the base it was."""
    for adapter in adapters(model):
        for handle in adapter.handles:  # type: ignore[union-attr]
            handle.remove()
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), nn.ModuleDict):
            delattr(module, NAME)


def adapters(model: nn.Module) -> list[BottleneckAdapter]:
    """The adapters in a model."""
    return [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
