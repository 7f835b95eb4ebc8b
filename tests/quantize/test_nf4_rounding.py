"""Calibrated NF4 codes: bitsandbytes' own format, and less lost on what a layer reads than by its own rounding."""

from __future__ import annotations

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402

from peftkit.quantize import nf4_rounding  # noqa: E402
from peftkit.quantize.nf4_rounding import asymmetric_target, requantize  # noqa: E402


def layer_of(weight, double=True):
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=double
    )
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def opened(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def drawn(rows, columns, seed=0):
    """A weight, and inputs whose columns are correlated and of very different sizes, as a transformer's are."""
    torch.manual_seed(seed)
    sizes = torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns), torch.randn(512, columns // 4) @ torch.randn(columns // 4, columns) * sizes


def lost(weight, held, inputs):
    return float(((weight - held) @ inputs.T).norm() / (weight @ inputs.T).norm())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(16, 128), (12, 40), (3, 21)])
def test_a_layer_loses_less_on_its_inputs_and_holds_what_is_said(shape, double):
    weight, inputs = drawn(*shape)
    layer = layer_of(weight, double)
    plain = lost(weight, opened(layer), inputs)
    size = layer.weight.data.shape
    (held,) = requantize([layer], [weight], inputs.T @ inputs)
    torch.testing.assert_close(opened(layer), held, rtol=1e-6, atol=1e-6)  # as bitsandbytes opens it
    assert layer.weight.data.shape == size
    assert layer.weight.quant_state.nested is double
    assert lost(weight, held, inputs) < 0.7 * plain


def test_smaller_blocks_lose_less():
    weight, inputs = drawn(16, 128)[0], torch.randn(512, 128)
    layers = {size: layer_of(weight.clone()) for size in (128, 64, 32)}
    found = {}
    for size, layer in layers.items():
        (held,) = requantize([layer], [weight], inputs.T @ inputs, size)
        torch.testing.assert_close(opened(layer), held, rtol=1e-6, atol=1e-6)
        assert layer.weight.quant_state.absmax.numel() == 16 * 128 // size
        found[size] = lost(weight, held, inputs)
    assert found[32] < found[64] < found[128]


def test_a_layer_aims_at_what_it_gave_before_its_inputs_changed(monkeypatch):
    weight, inputs = drawn(16, 128)
    changed = inputs + 0.1 * inputs.roll(1, dims=1)
    gram, cross = changed.T @ changed, inputs.T @ changed
    assert torch.equal(asymmetric_target(weight, gram, gram), weight)  # nothing was lost before it
    monkeypatch.setattr(nf4_rounding, "ASYMMETRY", 1.0)
    wanted = inputs @ weight.T
    before = float((changed @ weight.T - wanted).norm())
    found = asymmetric_target(weight, gram, cross)
    assert float((changed @ found.T - wanted).norm()) < 0.5 * before


def test_inputs_that_say_nothing_leave_bitsandbytes_own_bytes(monkeypatch):
    monkeypatch.setattr(nf4_rounding, "SCALES", [1.0])
    weight, _ = drawn(8, 128)
    layer = layer_of(weight, double=False)
    requantize([layer], [weight], torch.eye(128))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(layer.weight.data, packed.view(layer.weight.data.shape))
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)


def test_layers_that_read_the_same_are_rounded_as_each_by_itself():
    weight, inputs = drawn(8, 128)
    together = [layer_of(weight[:3].clone()), layer_of(weight[3:].clone())]
    apart = [layer_of(weight[:3].clone()), layer_of(weight[3:].clone())]
    gram = inputs.T @ inputs
    requantize(together, [weight[:3], weight[3:]], gram)
    for layer, own in zip(apart, (weight[:3], weight[3:])):
        requantize([layer], [own], gram)
    assert all(torch.equal(a.weight.data, b.weight.data) for a, b in zip(together, apart))


def test_columns_that_are_never_read_and_weights_of_zero_do_no_harm():
    weight, inputs = drawn(8, 128)
    weight[:, 64:] = 0
    inputs[:, :32] = 0
    layer = layer_of(weight)
    (held,) = requantize([layer], [weight], inputs.T @ inputs)
    assert held.isfinite().all()
    assert lost(weight, held, inputs) < 0.2
