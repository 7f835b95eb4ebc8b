"""Low-rank factors that correct the quantization error: LoftQ (Li et al. 2023, arXiv:2310.08659), fitted on data.

    W ≈ Ŵ + B A,   alternating: quantize W − B A to Ŵ, fit B A to W − Ŵ

A and B minimize the error on a layer's inputs, ‖(W − Ŵ − B A) X‖, which has a closed form (QERA, Zhang et al. 2024,
arXiv:2410.06040), and not the error of the weights alone. LoRA starts from them: see ``methods/loftq_init.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from peftkit.quantize.nf4_rounding import damped

Factors = tuple[Tensor, Tensor]  # A [rank, in] and B [out, rank]


def fit_factors(error: Tensor, gram: Tensor, rank: int) -> Factors:
    """The A and B of a rank that minimize ‖(error − B A) X‖, scaled to equal norms.

    Args:
        error: W − Ŵ, [out, in] in fp32.
        gram: X Xᵀ, [in, in] in fp32.
        rank: what exceeds the smaller side of ``error`` is filled with zeros. 0 gives empty factors.
    """
    lower = torch.linalg.cholesky(damped(gram))
    left, values, right = torch.linalg.svd(error @ lower, full_matrices=False)
    a, b = error.new_zeros(rank, error.shape[1]), error.new_zeros(error.shape[0], rank)
    used = min(rank, len(values))
    a[:used] = torch.linalg.solve_triangular(lower, right[:used], upper=False, left=False)
    b[:, :used] = left[:, :used] * values[:used]
    root = (b.norm(dim=0) / a.norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny)).sqrt()
    return a * root[:, None], b / root.clamp_min(torch.finfo(b.dtype).tiny)


@contextmanager
def low_rank_correction(model: torch.nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, the named layers compute x Ŵᵀ + (x Aᵀ) Bᵀ."""

    def add(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda _, inputs, output: output + inputs[0].to(a.dtype) @ a.T @ b.T

    with ExitStack() as hooks:
        for name, pair in factors.items():
            layer: Any = model.get_submodule(name)
            dtype = getattr(layer, "compute_dtype", None) or torch.float32
            hooks.enter_context(layer.register_forward_hook(add(*(factor.to(dtype) for factor in pair))))
        yield
