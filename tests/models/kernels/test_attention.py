"""The CPU's attention against torch's scaled_dot_product_attention, and inside real architectures."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from peftkit.models import packing
from peftkit.models.kernels import attention

MASKS = {
    "causal": lambda t: None,
    "none": lambda t: None,
    "padding": lambda t: (torch.arange(t) < torch.tensor([[t], [t - 3]]))[:, None, None, :],
    "left": lambda t: _causal(t) & (torch.arange(t) >= torch.tensor([[0], [4]]))[:, None, None, :],
    "two documents": lambda t: _causal(t) & (torch.arange(t)[:, None] // 5 == torch.arange(t) // 5),
}


def _causal(t):
    return torch.ones(1, 1, t, t, dtype=torch.bool).tril()


def tensors(tokens=11, heads=4, key_heads=2, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, width), (2, key_heads, tokens, width), (2, key_heads, tokens, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("block", "tile"), [(4, 1), (128, 1), (128, 1 << 20)])
@pytest.mark.parametrize("saved", [0, 4])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_equals_torch_forward_and_backward(monkeypatch, block, tile, saved, name, key_heads):
    for setting, value in (("BLOCK", block), ("TILE", tile), ("MAX_SAVED", saved)):
        monkeypatch.setattr(attention, setting, value)
    inputs, mask = tensors(key_heads=key_heads), MASKS[name](11)
    causal = name == "causal"
    ours = attention.blockwise(*inputs, mask, causal, 0.3).transpose(1, 2)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=causal, scale=0.3, enable_gqa=True)
    seen = torch.ones(2, 1, 11, 1, dtype=torch.bool) if mask is None else mask.any(-1, keepdim=True)
    torch.testing.assert_close(ours * seen, torch.where(seen, theirs, 0.0))  # a query that sees nothing is padding
    weight = torch.randn(ours.shape, dtype=torch.float64) * seen
    wanted = torch.autograd.grad((torch.where(seen, theirs, 0.0) * weight).sum(), inputs)
    for got, expected in zip(torch.autograd.grad((ours * weight).sum(), inputs), wanted):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(monkeypatch, dropout):
    monkeypatch.setattr(attention, "BLOCK", 3)

    def run(*inputs):
        torch.manual_seed(5)
        return attention.blockwise(*inputs, None, True, 0.5, dropout)

    assert torch.autograd.gradcheck(run, tensors(tokens=5, width=3))


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    query, key, _ = (t.detach() for t in tensors(tokens=6, key_heads=4, dtype=torch.float32))
    value = torch.ones_like(key)
    torch.manual_seed(0)
    drawn = torch.stack([attention.blockwise(query, key, value, None, False, 0.5, 0.3) for _ in range(400)])
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn.mean(0), torch.ones(2, 6, 4, 6), rtol=0.1, atol=0.1)


def test_bf16_is_no_further_from_fp64_than_torchs_own():
    exact = tensors(tokens=150, width=32)
    half = [t.detach().bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in half]
    weight = torch.randn(2, 4, 150, 32, dtype=torch.float64)

    def outcome(function, inputs):
        out = function(inputs)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)]

    def torchs(inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def ours(inputs):
        return attention.blockwise(*inputs, None, True, 32**-0.5).transpose(1, 2)

    truth = outcome(torchs, exact)
    for wanted, a, b in zip(truth, outcome(ours, half), outcome(torchs, half)):
        assert (a - wanted).norm() < 1.5 * (b - wanted).norm() + 1e-3 * wanted.norm()


CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    ),
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "bert": BertConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    kind = AutoModel if name == "bert" else AutoModelForCausalLM
    return kind.from_config(CONFIGS[name], attn_implementation="sdpa").to(torch.bfloat16).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_inside_a_model(monkeypatch, name):
    """Padded rows: outputs stay within bf16's rounding of sdpa's, and our kernel is what ran."""
    model = make(name)
    ours = copy.deepcopy(model)
    assert attention.use_cpu_attention(ours)
    calls, kernel = [], attention.blockwise
    monkeypatch.setattr(attention, "blockwise", lambda *a: calls.append(1) or kernel(*a))
    ids = torch.randint(3, 101, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(input_ids=ids, attention_mask=mask)[0][mask.bool()]
        theirs = model(input_ids=ids, attention_mask=mask)[0][mask.bool()].float()
        got = ours(input_ids=ids, attention_mask=mask)[0][mask.bool()].float()
    assert len(calls) == 2
    assert (got - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


def test_packed_rows_stay_apart_and_generation_goes_to_sdpa():
    model = make("llama")
    expected = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert attention.use_cpu_attention(model)
    assert packing.supports_packing(model) == (True, "")
    got = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_normalized_weights(monkeypatch, dtype):
    """The formula in fp64, with the mask that was drawn: softmax first, dropout after, in both directions."""
    inputs, masks, draw = tensors(key_heads=4, dtype=dtype), [], attention.dropout.mask
    monkeypatch.setattr(attention.dropout, "mask", lambda *a: masks.append(draw(*a)) or masks[-1])
    ours = attention.blockwise(*inputs, MASKS["padding"](11), False, 0.3, 0.4).transpose(1, 2)
    query, key, value = exact = [t.detach().double().requires_grad_() for t in inputs]
    scores = (query @ key.mT * 0.3).masked_fill(~MASKS["padding"](11), -torch.inf)
    (mask,) = masks
    assert 0.3 < (mask == 0).double().mean() < 0.5
    theirs = (scores.softmax(-1) * mask.view(scores.shape).double()) @ value
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(ours.double(), theirs, **bound)
    weight = torch.randn_like(ours)
    wanted = torch.autograd.grad((theirs * weight).sum(), exact)
    for mine, expected in zip(torch.autograd.grad((ours * weight).sum(), inputs), wanted):
        torch.testing.assert_close(mine.double(), expected, **bound)


def test_in_fp32_only_dropout_uses_it(monkeypatch):
    model = make("bert").float()
    ours = copy.deepcopy(model)
    assert attention.use_cpu_attention(ours)
    calls, kernel = [], attention.blockwise
    monkeypatch.setattr(attention, "blockwise", lambda *a: calls.append(a[-1]) or kernel(*a))
    ids = torch.randint(3, 101, (3, 12))
    assert torch.equal(ours(input_ids=ids)[0], model(input_ids=ids)[0])
    assert calls == []
    ours.train()(input_ids=ids)
    assert calls == [0.1, 0.1]


def test_only_sdpa_models_in_bf16_or_fp32_are_changed_and_nothing_is_saved_of_it(tmp_path):
    assert not attention.use_cpu_attention(make("llama").double())
    eager = make("llama")
    eager.set_attn_implementation("eager")
    assert not attention.use_cpu_attention(eager)
    model = make("llama")
    attention.use_cpu_attention(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
