"""The faster dropout: its share, its mean, its gradient, and that a mask can be made again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftkit.models.kernels import dropout, lora_linear
from peftkit.planning.trace import fake_tensor_mode


@pytest.mark.parametrize("dtype", dropout.DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_by_itself_with_the_probability_asked_for(p, dtype):
    torch.manual_seed(0)
    mask = dropout.mask(torch.Size((400, 1001)), p, dtype)
    kept = mask > 0
    assert mask[kept].unique().tolist() == [torch.tensor(1 / (1 - p)).to(dtype).item()]
    spread = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs((~kept).double().mean().item() - p) < 5 * spread
    lanes = kept.flatten()[: kept.numel() // 4 * 4].view(-1, 4).double()
    torch.testing.assert_close(torch.corrcoef(lanes.T), torch.eye(4, dtype=torch.double), atol=0.02, rtol=0)
    shifted = ((~kept[:, 1:]) & (~kept[:, :-1])).double().mean().item()
    assert shifted == pytest.approx(p * p, abs=0.01)


def test_a_seed_makes_the_same_mask_again_and_leaves_torchs_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again = (dropout.mask(torch.Size((7, 9)), 0.3, torch.bfloat16, 5) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, dropout.mask(torch.Size((7, 9)), 0.3, torch.bfloat16, 6))
    assert torch.equal(torch.rand(3), expected)


def test_a_mask_made_in_a_plan_leaves_later_ones_alone():
    """A plan's tensors have no values, and nothing worked out from them may be remembered."""
    dropout._bits.cache_clear()
    with fake_tensor_mode():
        dropout.mask(torch.Size((7, 9)), 0.3, torch.bfloat16, 5)
    kept = torch.tensor(1 / 0.7).bfloat16()
    assert dropout.mask(torch.Size((7, 9)), 0.3, torch.bfloat16, 5).max() == kept


@pytest.mark.parametrize("p", [0.01, 0.1, 1 / 3, 0.5, 0.875, 0.99])
def test_the_factor_is_rounded_as_torch_does(p):
    assert dropout._bits(1 / (1 - p)) == torch.tensor(1 / (1 - p)).bfloat16().view(torch.int16).item()


@pytest.mark.parametrize("dtype", dropout.DTYPES)
def test_layers_drop_in_training_only_and_their_gradient_goes_through_the_same_mask(dtype):
    model = nn.Sequential(nn.Dropout(0.4), nn.Dropout(0.0))
    assert dropout.use_cpu_dropout(model) == 2
    torch.manual_seed(3)
    x = torch.randn(64, 33).abs().add(0.5).to(dtype).requires_grad_()  # no zero of its own
    y = model.train()(x)
    y.sum().backward()
    zero = y == 0
    assert 0.3 < zero.float().mean() < 0.5
    assert torch.equal(x.grad == 0, zero)
    torch.testing.assert_close(y[~zero], x[~zero] * torch.tensor(1 / 0.6).to(dtype))
    assert torch.equal(model.eval()(x), x)
    wide = torch.randn(5, 6, dtype=torch.float64)  # torch's own
    torch.manual_seed(1)
    expected = nn.functional.dropout(wide, 0.4)
    torch.manual_seed(1)
    assert torch.equal(model.train()(wide), expected)


@pytest.mark.parametrize("dtype", dropout.DTYPES)
def test_low_rank_with_dropout_is_the_matmul_with_the_dropped_input(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    weight, a, b = torch.randn(6, 8).to(dtype), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    b.requires_grad_()
    torch.manual_seed(9)
    seed = dropout.new_seed()
    mask = dropout.mask(x.shape, 0.5, x.dtype, seed)
    torch.manual_seed(9)
    ours = lora_linear.linear(x, weight, None, a, b, 2.0, 0.5)
    inputs = [copy.deepcopy(t.detach()).double().requires_grad_() for t in (x, a, b)]
    theirs = inputs[0] @ weight.double().T + 2 * ((inputs[0] * mask.double()) @ inputs[1].T) @ inputs[2].T
    torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.15)
    upstream = torch.randn(5, 6).to(dtype)
    found = torch.autograd.grad(ours, (x, a, b), upstream)
    wanted = torch.autograd.grad(theirs, inputs, upstream.double())
    for mine, other in zip(found, wanted, strict=True):
        assert (mine.double() - other).abs().max() <= 0.03 * other.abs().max()
