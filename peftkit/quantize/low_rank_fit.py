"""Low-rank factors that make up for what quantization takes: LoftQ (Li et al. 2023, arXiv:2310.08659), seen by data.

    W ≈ Ŵ + B A,   rounding Ŵ of W − B A and fitting B A to W − Ŵ in turn

A and B are fitted on what a layer reads, ‖(W − Ŵ − B A) X‖ → min, which has a closed form (QERA, Zhang et al. 2024,
arXiv:2410.06040), and not on the weights alone. LoRA starts from them: see ``methods/_loftq.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean of Σ x² that is added to each column's, as for the rounding."""
Factors = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


def factors(lost: Tensor, gram: Tensor, rank: int) -> Factors:
    """A and B of a rank with the least ‖(lost − B A) X‖, sharing the size of their product evenly.

    Args:
        lost: [out, in] in fp32.
        gram: X Xᵀ, [in, in] in fp32.
        rank: at most the smaller side of ``lost`` is used; the rest is zero. 0 gives empty factors.
    """
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    lower = torch.linalg.cholesky(damped)
    left, values, right = torch.linalg.svd(lost @ lower, full_matrices=False)
    a, b = lost.new_zeros(rank, lost.shape[1]), lost.new_zeros(lost.shape[0], rank)
    used = min(rank, len(values))
    a[:used] = torch.linalg.solve_triangular(lower, right[:used], upper=False, left=False)
    b[:, :used] = left[:, :used] * values[:used]
    root = (b.norm(dim=0) / a.norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny)).sqrt()
    return a * root[:, None], b / root.clamp_min(torch.finfo(b.dtype).tiny)


@contextmanager
def completed(packed: torch.nn.Module, starts: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, the layers that are named give x Ŵᵀ + (x Aᵀ) Bᵀ."""

    def adder(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda _, given, made: made + given[0].to(a.dtype) @ a.T @ b.T

    handles = []
    for name, both in starts.items():
        layer: Any = packed.get_submodule(name)
        dtype = getattr(layer, "compute_dtype", None) or torch.float32
        handles.append(layer.register_forward_hook(adder(*(one.to(dtype) for one in both))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
