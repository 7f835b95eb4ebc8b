"""Trained parameters that no gradient reaches in the first steps, so that nothing stays frozen unnoticed.

One step proves nothing: while LoRA's B is zero, so is the gradient of A, and a warmup may start with a learning rate of
zero. A parameter is reported when its gradient was missing or exactly zero in every one of the first steps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from peftkit.errors import TrainingError

STEPS, FEWEST = 5, 3
"""Steps that are watched, and how few of them are enough for a verdict."""
LEAVE_OUT = "Leave such parameters out of the method (target_modules, exclude_modules, layers)"
LISTED = 6
"""Most groups of names in a message."""


@dataclass(frozen=True)
class NoGradient:
    """Trained parameters without a gradient, by name."""

    steps: int
    unreached: tuple[str, ...]
    """Those that the backward pass never came to: no forward pass used them, or not on the way to the loss."""
    zero: tuple[str, ...]
    """Those whose gradients were exactly zero."""

    @property
    def message(self) -> str:
        """What happened, to which parameters, and what to do."""
        parts = []
        if self.unreached:
            parts.append(f"no forward pass reaches {_grouped(self.unreached)}")
        if self.zero:
            parts.append(f"the gradient is exactly zero of {_grouped(self.zero)}")
        count = len(self.unreached) + len(self.zero)
        what = "1 trained parameter gets" if count == 1 else f"{count} trained parameters get"
        remedy = f"{LEAVE_OUT}, or check that the rows use {'it' if count == 1 else 'them'}"
        return f"{what} no gradient in the first {self.steps} steps: {'; '.join(parts)}. {remedy}"


class GradientWatch:
    """Watches the gradients of the first steps; reads only those that have been zero so far.

    Args:
        parameters: the trained parameters by name.
        start: optimizer steps already done, those of the run that is resumed; a run that is resumed after its first
            steps has had its report.
        total: optimizer steps of the whole run.
        combine: sums numbers over the processes, where each of them has a shard of every gradient.
        replicated: whether each of several processes has all of every parameter. torch then averages the gradients of
            all parameters, and cannot go on where one has none.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], *, start: int, total: int,
        combine: Callable[[torch.Tensor], torch.Tensor] | None = None, replicated: bool = False,
    ) -> None:  # fmt: skip
        steps = min(total, max(STEPS, start + FEWEST)) - start
        self._steps = self._left = steps if start < STEPS and steps >= FEWEST else 0
        self._zero = dict(parameters) if self._steps else {}
        self._unreached = set(self._zero)
        self._combine, self._replicated = combine, replicated

    def observe(self) -> NoGradient | None:
        """Reads a step's gradients before they are cleared; after the last watched step, what had none.

        Raises:
            TrainingError: a parameter has no gradient, and several processes are to average them.
        """
        if not self._left:
            return None
        self._left -= 1
        if self._zero:
            self._read()
        if self._unreached and self._replicated:
            names = _grouped(name for name in self._zero if name in self._unreached)
            raise TrainingError(
                f"no forward pass reaches {names}, and several processes can only average gradients of all trained "
                f"parameters. {LEAVE_OUT}, or train in one process"
            )
        if self._left or not self._zero:
            return None
        unreached = tuple(name for name in self._zero if name in self._unreached)
        zero = tuple(name for name in self._zero if name not in self._unreached)
        self._zero = {}
        return NoGradient(self._steps, unreached, zero)

    def _read(self) -> None:
        """Drops the parameters that have a gradient; one transfer from the device for all of them."""
        device = next(iter(self._zero.values())).device
        counts = torch.stack([_count(parameter, device) for parameter in self._zero.values()])
        if self._combine is not None:
            counts = self._combine(counts)
        for name, (reached, nonzero) in zip(list(self._zero), counts.tolist(), strict=True):
            if reached:
                self._unreached.discard(name)
            if nonzero:
                del self._zero[name]


def _count(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[whether there is a gradient, how many of its numbers are not zero], of this process's shard."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(2, dtype=torch.int64, device=device)
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    nonzero = torch.count_nonzero(local).to(device)
    return torch.stack([torch.ones_like(nonzero), nonzero])


def _grouped(names: Iterable[str]) -> str:
    """``encoder.layer.*.dense.weight (12)``: the names of numbered blocks as one."""
    groups = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    texts = [f"{name} ({count})" if count > 1 else name for name, count in groups.items()]
    return ", ".join(texts[:LISTED]) + (f" and {len(texts) - LISTED} more" if len(texts) > LISTED else "")
