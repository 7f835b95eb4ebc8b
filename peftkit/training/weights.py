"""The trained weights by name, as checkpoints store them, and their exponential moving average (EMA).

With ``training.weight_averaging``, the mean of the weights is validated and exported in place of the last step's:
mean ← k · mean + (1 − k) · weights after every step n, with k = min(decay, (1 + n) / (10 + n)): the first steps,
which are far off, are soon forgotten (Polyak & Juditsky 1992, SIAM J. Control Optim. 30(4); of network weights:
Tarvainen & Valpola 2017, arXiv:1703.01780).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from peftkit.distributed import sharding, zero
from peftkit.distributed.session import Session
from peftkit.errors import CheckpointError
from peftkit.schema.recipe import Recipe
from peftkit.training.step import TaskModule

METHOD, AVERAGE = "method/", "average/"
"""Prefixes, in a checkpoint, of a method's own tensors besides parameters, and of averages."""
Tensors = Mapping[str, torch.Tensor]


class TrainedWeights:
    """The trained parameters of a module that Accelerate has prepared."""

    def __init__(self, module: TaskModule, recipe: Recipe, session: Session) -> None:
        self._module, self._method, self._session = module, recipe.method, session
        self._decay = recipe.training.weight_averaging
        self.means = {name: value.detach().clone() for name, value in self.named().items()} if self._decay else {}
        """The average of each parameter, in its dtype, shape and placement; empty if the recipe does not average."""

    def named(self) -> dict[str, torch.Tensor]:
        """The parameters by name; of sharded ones, this process's shard."""
        if self._session.sharded:
            sharding.reshard(self._module)
        return {name: value for name, value in self._module.model.named_parameters() if value.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, unsharded; a collective if parameters are sharded."""
        trained = {name: sharding.unshard(value).detach() for name, value in self.named().items()}
        own = {METHOD + name: value for name, value in self._method.state(self._module.model).items()}
        return trained | own | {AVERAGE + name: sharding.unshard(mean) for name, mean in self.means.items()}

    def load(self, tensors: Tensors, place: Path) -> None:
        """Restore the result of ``tensors``; raises CheckpointError if ``place`` has other parameters."""
        trained = self.named()
        saved = {name: tensor for name, tensor in tensors.items() if not name.startswith((METHOD, AVERAGE))}
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        expected = {name: zero.full_shape(tensor) for name, tensor in trained.items()}
        if shapes != expected:
            differing = sorted({name for name, _ in set(shapes.items()) ^ set(expected.items())})[:3]
            raise CheckpointError(f"{place} holds other parameters than this recipe trains: {', '.join(differing)}")
        sharding.load_full(trained, saved)
        self._method.load_state(self._module.model, _without_prefix(METHOD, tensors))
        if self._decay:
            # a resumed run may begin to average
            sharding.load_full(self.means, _without_prefix(AVERAGE, tensors) or saved)

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Add the weights after a step, counted from 1, to the average."""
        if self._decay:
            parameters, keep = self.named(), min(self._decay, (1 + step) / (10 + step))
            for name, mean in self.means.items():
                mean.lerp_(parameters[name].detach(), 1 - keep)

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the context, the module has the averaged weights."""
        parameters = self.named() if self._decay else {}
        saved = {name: parameters[name].detach().clone() for name in self.means}
        _copy(self.means, parameters)
        try:
            yield
        finally:
            _copy(saved, parameters)

    def load_ema(self) -> None:
        """Load the averaged weights into the module."""
        if self._decay:
            _copy(self.means, self.named())


@torch.no_grad()
def _copy(tensors: Tensors, parameters: Tensors) -> None:
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _without_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
