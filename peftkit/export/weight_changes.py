"""What a method changed in a base, as tensors by parameter name: put on, taken off, and exchanged for another.

    deltas = Deltas(model)
    deltas.add("default", Delta(shapes, tensors))
    deltas.use("default")        # the trained model
    deltas.use(None)             # the base, as it was

A tensor whose name the base knows stands for that parameter (a bias, a head); the others are those of bottleneck
adapters, which ``shapes`` describes. Nothing here touches weights that are not named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.methods.layers import bottleneck
from peftkit.methods.layers.bottleneck import AdapterShape

PLACE = "peftkit_deltas"
"""The attribute of a model under which its deltas are found."""


@dataclass(frozen=True)
class Delta:
    """One trained method's changes."""

    shapes: tuple[AdapterShape, ...]
    tensors: Mapping[str, Tensor]


class Deltas:
    """Several deltas of one model, of which at most one is on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: dict[str, Delta] = {}
        self._base: dict[str, Tensor] = {}
        self.active: str | None = None
        setattr(model, PLACE, self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the deltas."""
        return tuple(self._held)

    def add(self, name: str, delta: Delta) -> None:
        """Holds a delta ready; raises ModelError when the model has no place for one of its tensors."""
        before = self.active
        self._held[name] = delta
        try:
            self.use(name)
        except (AttributeError, KeyError, RuntimeError) as error:
            del self._held[name]
            self.use(before)
            raise ModelError(f"the adapter does not fit its base: {str(error).splitlines()[0]}") from error
        self.use(before if before is not None else name)

    def use(self, name: str | None) -> None:
        """Puts one delta on in place of the one that is on; None leaves the base alone."""
        self._take_off()
        if name is not None:
            self._put_on(self._held[name])
            self.active = name

    def _put_on(self, delta: Delta) -> None:
        bottleneck.insert(self._model, delta.shapes)
        fresh = {name for name, _ in self._model.named_parameters() if f".{bottleneck.NAME}." in name}
        lost = sorted(fresh - set(delta.tensors))
        if lost:
            raise KeyError(f"there are no weights for {lost[0]}")
        for name, tensor in delta.tensors.items():
            parameter = self._model.get_parameter(name)
            if parameter.shape != tensor.shape:
                raise RuntimeError(f"{name} has shape {list(tensor.shape)}, and the base {list(parameter.shape)}")
            if name not in fresh:
                self._base[name] = parameter.data
            parameter.data = tensor.to(parameter.device, torch.float32, copy=True)  # as it was trained
            parameter.requires_grad_(False)
            self._widen_beside(name)

    def _widen_beside(self, name: str) -> None:
        """A norm computes with its scale and its shift in one precision."""
        place = name.rpartition(".")[0]
        beside = list(self._model.get_submodule(place).named_parameters(recurse=False))
        if all(parameter.ndim <= 1 for _, parameter in beside):
            for other, parameter in beside:
                self._base.setdefault(f"{place}.{other}", parameter.data)
                parameter.data = parameter.data.float()

    def _take_off(self) -> None:
        bottleneck.remove(self._model)
        known = dict(self._model.named_parameters())
        for name, value in self._base.items():
            if name in known:  # a learned scale that went with its adapter is not
                known[name].data = value
        self._base.clear()
        self.active = None


def deltas_of(model: Any) -> Deltas | None:
    """The deltas that were loaded onto a model, or None."""
    found: Deltas | None = getattr(model, PLACE, None)
    return found


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trained model's delta: its trained parameters, in fp32 on the CPU."""
    return {
        name: parameter.detach().to("cpu", torch.float32).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
