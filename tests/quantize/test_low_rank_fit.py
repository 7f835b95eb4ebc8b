"""The factors of LoftQ's start are the best there are for what a layer reads."""

from __future__ import annotations

import torch

from peftkit.quantize.low_rank_fit import fit_factors
from peftkit.quantize.nf4_rounding import DAMPING


def made():
    generator = torch.Generator().manual_seed(0)
    lost = torch.randn(12, 20, generator=generator)
    read = torch.randn(300, 20, generator=generator) * torch.linspace(0.1, 3, 20)
    return lost, read.T @ read


def error(lost, gram):
    return float((lost @ gram @ lost.T).trace())


def test_no_other_factors_of_the_rank_lose_less():
    lost, gram = made()
    a, b = fit_factors(lost, gram, 4)
    assert a.shape == (4, 20)
    assert b.shape == (12, 4)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(20)
    # by Eckart and Young, in the norm in which errors are counted
    values = torch.linalg.svdvals(lost @ torch.linalg.cholesky(damped))
    assert abs(error(lost - b @ a, damped) / float(values[4:].square().sum()) - 1) < 1e-4
    left, own, right = torch.linalg.svd(lost, full_matrices=False)
    assert error(lost - b @ a, gram) < 0.9 * error(lost - (left[:, :4] * own[:4]) @ right[:4], gram)
    a, b = a.requires_grad_(), b.requires_grad_()
    rest = lost - b @ a
    (rest @ damped @ rest.T).trace().backward()  # at the least error nothing draws either factor elsewhere
    assert max(float(a.grad.abs().max()), float(b.grad.abs().max())) < 1e-3 * error(lost, damped)


def test_both_factors_are_of_one_size_and_may_be_wider_than_the_layer():
    lost, gram = made()
    a, b = fit_factors(lost, gram, 4)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = fit_factors(lost, gram, 30)
    torch.testing.assert_close(b @ a, lost, rtol=1e-3, atol=1e-3)
    assert not a[12:].any()
    assert not b[:, 12:].any()
    a, b = fit_factors(lost, gram, 0)
    assert not (b @ a).any()
