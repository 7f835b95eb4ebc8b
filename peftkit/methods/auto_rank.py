"""``rank: auto``: the rank of LoRA's updates, from the part of the first gradients' spectrum that other rows share.

At its start B is zero, and the gradient of B is that of the weight seen through A: a random projection, whose singular
vectors are those of the weight's gradient as long as A has more rows than matter (Halko et al. 2011, arXiv:0909.4061).
That gradients of weights have a low rank is what LoRA rests on (Zhao et al. 2024, arXiv:2403.03507; LoRA-GA: Wang et
al. 2024, arXiv:2407.05000). A spectrum alone counts the noise of a few rows as well, so the gradient's best rank-r part
on one half of the rows is judged by the other half: its inner product with that half's gradient, summed over all
modules, grows with r while the added directions are shared by both, and no further.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peftkit.schema.automatic import Automatic, Candidate, Choice
from peftkit.schema.sections import ConfigSection
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

OVERSAMPLING = 2
"""Rows of A in the probe per rank that may be chosen."""


class RankOptions(ConfigSection):
    """The rank where the run chooses."""

    at_most: Annotated[int, Field(ge=1)] = 32
    """Largest rank."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of what the largest rank is estimated to bring that may be given up for a smaller adapter."""
    rows: Annotated[int, Field(ge=16)] = 512
    """Most training rows to look at; half of them fit a new head."""


class AutoRank(Automatic):
    """One rank for all modules, chosen on the data."""

    auto: RankOptions = RankOptions()
    """How to choose: at_most, tolerance, rows."""

    @property
    def rows(self) -> int:
        return self.auto.rows

    @property
    def widest(self) -> int:
        return self.auto.at_most

    @property
    def probed(self) -> int:
        return OVERSAMPLING * self.auto.at_most

    @property
    def span(self) -> str:
        return f"between rank 1 and {self.auto.at_most}"

    def choose(self, field: str, loaded: LoadedModel, gradients: Iterable[None]) -> Choice:
        """The smallest rank whose estimate is within the tolerance of the best.

        The largest one where no direction of one half of the rows holds on the other.
        """
        halves = mean_gradients(loaded, gradients)
        shares = shared_by_rank(halves, self.auto.at_most)
        return self.decide(field, shares)

    def decide(self, field: str, shares: np.ndarray) -> Choice:
        """The choice from what each rank from 1 brings, [ranks]."""
        best, most, threshold = float(shares.max()), self.auto.at_most, 1 - self.auto.tolerance
        chosen = most
        if best > 0:
            chosen = int((shares >= threshold * best).argmax()) + 1
            share = f"an estimated {shares[chosen - 1] / best:.0%} of what the best rank up to {most} brings"
            summary = f"method.{field}=auto takes rank {chosen}: {share} (asked for: {threshold:.0%})"
        else:
            summary = f"method.{field}=auto takes rank {most}: the gradients of both halves of the rows share nothing"
        scale = best if best > 0 else 1.0
        curve = tuple(Candidate(rank, float(share) / scale, 0.0) for rank, share in enumerate(shares, 1))
        return Choice(field, chosen, self.model_dump(mode="json"), chosen, "rank", curve, threshold, summary)


def mean_gradients(loaded: LoadedModel, gradients: Iterable[None]) -> list[tuple[Tensor, Tensor]]:
    """For every adapted module the gradient of B, [out, rank], over the even and the odd groups of rows."""
    factors = [p for name, p in loaded.model.named_parameters() if p.requires_grad and ".lora_B." in f".{name}."]
    sums: list[list[Any]] = [[None, None] for _ in factors]
    for number, _ in enumerate(gradients):
        for total, factor in zip(sums, factors):
            if factor.grad is not None:
                before = total[number % 2]
                total[number % 2] = factor.grad.float().clone() if before is None else before + factor.grad
    return [(first, second) for first, second in sums if first is not None and second is not None]


def shared_by_rank(halves: Iterable[tuple[Tensor, Tensor]], at_most: int) -> np.ndarray:
    """[ranks from 1] ⟨best rank-r part of one half's gradient, the other's⟩, both ways, summed over modules."""
    import torch

    total = torch.zeros(at_most, dtype=torch.float64)
    for pair in halves:
        for fitted, other in (pair, pair[::-1]):
            left, values, right = torch.linalg.svd(fitted.double(), full_matrices=False)
            aligned = (left * (other.double() @ right.T)).sum(0) * values
            aligned = aligned.cpu().cumsum(0)[:at_most]
            total[: len(aligned)] += aligned
            total[len(aligned) :] += aligned[-1]  # a module that has no higher rank
    return total.numpy()
