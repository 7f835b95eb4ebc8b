"""Distillation into scales and norms of an NF4 model: gradients as by autograd, smaller distance to the original."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftkit.quantize import distillation
from peftkit.quantize.distillation import distill, distillation_targets
from peftkit.quantize.nf4_rounding import get_scales

bnb = pytest.importorskip("bitsandbytes")


class Blocks(nn.Module):
    """Embeddings, two residual layers with norms, and a head that is tied."""

    def __init__(self, width=64, words=50):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, words, bias=False)
        self.requires_grad_(False)

    base_model = property(lambda self: self)

    def get_output_embeddings(self):
        return self.head

    def hidden(self, batch):
        hidden = self.embed(batch["input_ids"])
        for layer, norm in zip(self.layers, self.norms):
            hidden = hidden + layer(norm(hidden)).tanh()
        return self.norms[2](hidden)


def packed_of(whole, double=True):
    """The same with bitsandbytes' NF4 layers."""
    packed = copy.deepcopy(whole)
    for number, layer in enumerate(packed.layers):
        made = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4")
        made.load_state_dict(layer.state_dict())
        packed.layers[number] = made.to("cpu")
        assert made.weight.quant_state is not None
    return packed.requires_grad_(False)


@pytest.fixture
def whole():
    torch.manual_seed(0)
    return Blocks().eval()


def batches_of(count):
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 50, (4, 12))
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def forward(model, batch):
    return model.hidden(batch)


def divergence(whole, packed, batches):
    with torch.no_grad():
        said, right = (
            torch.cat([model.head(forward(model, one)).flatten(0, 1) for one in batches]).log_softmax(-1)
            for model in (packed, whole)
        )
    return float(nn.functional.kl_div(said, right, reduction="batchmean", log_target=True))


def error(whole, packed, batches):
    with torch.no_grad():
        a, b = (torch.cat([forward(model, one).flatten(0, 1) for one in batches]) for model in (whole, packed))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("causal", "distance"), [(True, divergence), (False, error)])
def test_it_comes_nearer_to_the_whole_on_rows_that_it_has_not_seen(whole, double, causal, distance):
    packed, batches = packed_of(whole, double), batches_of(60)
    learned, held_out = batches[:40], batches[40:]
    codes = [layer.weight.data.clone() for layer in packed.layers]
    before, told = distance(whole, packed, held_out), []
    distill(
        packed,
        learned,
        [distillation_targets(whole, one, forward, causal) for one in learned],
        forward,
        causal,
        told.append,
    )
    assert distance(whole, packed, held_out) < 0.9 * before
    assert all(torch.equal(layer.weight.data, code) for layer, code in zip(packed.layers, codes))
    assert torch.equal(packed.embed.weight, whole.embed.weight)
    assert torch.equal(packed.head.weight, whole.head.weight)
    assert not any(weight.requires_grad or weight.grad is not None for weight in packed.parameters())
    assert told == [1] * 40
    assert "forward" not in vars(packed.layers[0])


def test_scales_norms_and_biases_are_trained(whole):
    packed, batches = packed_of(whole), batches_of(12)
    before = {name: one.clone() for name, one in packed.named_parameters()}
    scales = [get_scales(layer.weight.quant_state) for layer in packed.layers]
    distill(packed, batches, [distillation_targets(whole, one, forward, True) for one in batches], forward, True)
    changed = {name for name, one in packed.named_parameters() if not torch.equal(one, before[name])}
    expected = {name for name, one in before.items() if one.dim() == 1 and one.abs().max() > 0}
    assert changed == expected
    assert {"layers.0.bias", "norms.2.weight"} <= changed
    assert not any(torch.equal(get_scales(one.weight.quant_state), old) for one, old in zip(packed.layers, scales))


def test_gradients_are_those_of_autograd(whole):
    layer = packed_of(whole, double=False).layers[0]
    state = layer.weight.quant_state
    scale, given = nn.Parameter(get_scales(state)), torch.randn(2, 5, 64, requires_grad=True)
    upstream = torch.randn(2, 5, 64)
    ours = torch.autograd.grad(distillation._ScaledMatmul.apply(given, scale, layer.weight), (given, scale), upstream)
    raw = layer.weight.data.flatten()
    codes = state.code[torch.stack([raw >> 4, raw & 15], 1).flatten().long()]
    dense = (codes.view(-1, state.blocksize) * scale[:, None]).view(64, 64)
    wanted = torch.autograd.grad(given @ dense.T, (given, scale), upstream)
    for own, right in zip(ours, wanted):
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-5)


def test_the_divergences_gradient_is_autograds_whatever_the_chunks(whole, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 3)
    found, wanted = torch.randn(10, 64, requires_grad=True), torch.randn(10, 64)
    said, right = (whole.head(one).log_softmax(-1) for one in (found, wanted))
    loss = nn.functional.kl_div(said, right, reduction="batchmean", log_target=True)
    (expected,) = torch.autograd.grad(loss, found)
    torch.testing.assert_close(distillation._kl_gradient(found.detach(), wanted, whole.head), expected)


def test_only_scored_tokens_are_aimed_at_and_never_padding(whole):
    batch = batches_of(1)[0]
    batch["labels"][1, :6] = -100
    assert len(distillation_targets(whole, batch, forward, causal=True)) == 4 * 11 - 4 - 5
    assert len(distillation_targets(whole, batch, forward, causal=False)) == 4 * 12 - 4
