"""What is trained: its tensors by name, as checkpoints hold them, and their average where one is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from peftkit.distributed import sharding, zero
from peftkit.distributed.session import Session
from peftkit.errors import CheckpointError
from peftkit.schema.recipe import Recipe
from peftkit.training.ema import WeightAverage
from peftkit.training.step import TaskModule

METHOD, AVERAGE = "method/", "average/"
"""Before the names of what a method keeps in a checkpoint besides its parameters, and of averages."""


class TrainedWeights:
    """The trained parameters of a module; made after Accelerate has placed them."""

    def __init__(self, module: TaskModule, recipe: Recipe, session: Session) -> None:
        self._module, self._method, self._session = module, recipe.method, session
        decay = recipe.training.weight_averaging
        self._average = WeightAverage(self.named(), decay) if decay else None

    def named(self) -> dict[str, torch.Tensor]:
        """The parameters by name, a sharded one as this process's piece."""
        if self._session.sharded:
            sharding.reshard(self._module)
        return {name: value for name, value in self._module.model.named_parameters() if value.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must hold, whole; a collective where parameters are sharded."""
        trained = {name: sharding.unshard(value).detach() for name, value in self.named().items()}
        own = self._method.state(self._module.model)
        means = self._average.tensors() if self._average else {}
        return trained | _prefixed(METHOD, own) | _prefixed(AVERAGE, means)

    def load(self, tensors: Mapping[str, torch.Tensor], place: Path) -> None:
        """Puts what ``tensors`` gave back; raises CheckpointError, naming the place, for other parameters."""
        trained = self.named()
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith((METHOD, AVERAGE))}
        shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
        expected = {name: zero.full_shape(tensor) for name, tensor in trained.items()}
        if shapes != expected:
            odd = sorted({name for name, _ in set(shapes.items()) ^ set(expected.items())})[:3]
            raise CheckpointError(f"{place} holds other parameters than this recipe trains: {', '.join(odd)}")
        sharding.load_full(trained, plain)
        self._method.load_state(self._module.model, _without(METHOD, tensors))
        if self._average:
            self._average.load(_without(AVERAGE, tensors) or plain)  # averaging may be allowed to begin late

    def update_ema(self, step: int) -> None:
        """Takes the weights after a step into the average."""
        if self._average:
            self._average.update(self.named(), step)

    def swap_ema(self) -> contextlib.AbstractContextManager[None]:
        """The module with averaged weights for a while; as it is where no average is kept."""
        return self._average.installed(self.named()) if self._average else contextlib.nullcontext()

    def load_ema(self) -> None:
        """Leaves the averaged weights in the module for good."""
        if self._average:
            self._average.install(self.named())


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
