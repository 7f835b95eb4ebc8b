"""Exponential moving average of the trained weights: validated, chosen and exported in place of the last step's.

Polyak & Juditsky 1992 (SIAM J. Control Optim. 30(4)); of network weights: Tarvainen & Valpola 2017, arXiv:1703.01780.
The weights of single steps lie scattered around a better point, the more so the higher the learning rate; their mean
is nearer to it, and costs one more copy of what is trained, which for an adapter is little.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from peftkit.distributed import sharding


class WeightAverage:
    """The mean of named parameters, of their own dtype, shape and placement.

    mean ← k · mean + (1 − k) · weights after every step n, with k = min(decay, (1 + n) / (10 + n)): early steps, which
    are far off, are soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.means = {name: held.detach().clone() for name, held in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], step: int) -> None:
        """Takes in the weights after a step, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.means.items():
            mean.lerp_(parameters[name].detach(), 1 - keep)

    @torch.no_grad()
    def install(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Puts the means into the parameters for good."""
        for name, mean in self.means.items():
            parameters[name].copy_(mean)

    @contextlib.contextmanager
    def installed(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Puts the means into the parameters, and the weights back afterwards."""
        kept = {name: parameters[name].detach().clone() for name in self.means}
        self.install(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in kept.items():
                    parameters[name].copy_(weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The means, whole; a collective where parameters are sharded."""
        return {name: sharding.unshard(mean) for name, mean in self.means.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from saved means."""
        sharding.load_full(self.means, tensors)
