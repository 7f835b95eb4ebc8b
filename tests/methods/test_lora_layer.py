"""The faster LoRA forward against peft's own: outputs and gradients in fp32, gradcheck in fp64, the same files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peftkit.methods.layers.fast_lora import accelerate_lora
from peftkit.models.kernels import lora_linear

LLAMA = LlamaConfig(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, attention_bias=True,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, resid_pdrop=0, embd_pdrop=0,
    attn_pdrop=0,
)  # fmt: skip
IDS = torch.randint(0, 101, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def torch_masks(monkeypatch):
    """Dropout draws torch's masks, as peft's does."""
    monkeypatch.setattr(lora_linear.dropout, "is_fast", lambda *_: False)


def pair(config=LLAMA, dtype=torch.float32, **settings):
    """peft's model, and a copy with the faster layers."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    plain = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=True)
    fast = copy.deepcopy(plain)
    assert accelerate_lora(fast) > 0
    return plain.train(), fast.train()


def outcome(model, seed=0):
    """Logits and gradients by parameter name."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(plain, fast, tolerance=1e-6):
    (expected, wanted), (got, found) = outcome(plain), outcome(fast)
    scale = expected.abs().max()
    assert ((got - expected).abs().max() / scale) < tolerance
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max() + 1e-12, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["linear", "conv1d"])
def test_equals_peft_in_fp32(config, dropout, torch_masks):
    plain, fast = pair(config, lora_dropout=dropout)
    assert_equal(plain, fast, 2e-6 if dropout else 1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"target_modules": ["q_proj"], "rank_pattern": {}}],
    ids=["dora", "rslora", "lora-bias", "one-layer-kind"],
)
def test_variants_take_pefts_way_or_equal_it(settings):
    plain, fast = pair(**settings)
    assert_equal(plain, fast, 1e-5)


def test_disabled_merged_and_several_adapters_equal_peft():
    plain, fast = pair()
    for model in (plain, fast):
        torch.manual_seed(7)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert_equal(plain, fast)
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "second"])
    assert_equal(plain, fast)
    for model in (plain, fast):
        model.set_adapter("second")
    assert_equal(plain, fast)
    with plain.disable_adapter(), fast.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for model in (plain, fast):
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_rows_with_different_adapters_take_pefts_way():
    plain, fast = pair()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        expected = plain.eval()(input_ids=IDS, adapter_names=names).logits
        torch.testing.assert_close(fast.eval()(input_ids=IDS, adapter_names=names).logits, expected)


def test_a_trained_base_still_gets_its_gradient():
    plain, fast = pair()
    for model in (plain, fast):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    assert_equal(plain, fast)


def test_gradient_checkpointing_gives_the_same_gradients(torch_masks):
    plain, fast = pair(lora_dropout=0.2)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast.enable_input_require_grads()
    assert_equal(plain, fast, 2e-6)


def test_what_is_saved_is_pefts_byte_for_byte(tmp_path):
    plain, fast = pair()
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(LLAMA), tmp_path / "fast").eval()
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(input_ids=IDS).logits, again(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_bf16_base_stays_near_fp32_and_makes_no_fp32_copy_of_its_input():
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.manual_seed(0)
    plain, fast = pair(dtype=torch.bfloat16)
    layer = fast.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(40, 48, dtype=torch.bfloat16)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.numel() >= x.numel():
                made.append(func)
            return out

    with Watch():
        out = layer(x.requires_grad_())
        out.sum().backward()
    assert not made
    expected = plain.base_model.model.model.layers[0].mlp.down_proj.float()(x.detach().float())
    assert ((out.float() - expected).abs().max() / expected.abs().max()) < 0.02
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_under_autocast_no_further_from_fp32_than_peft():
    plain, fast = pair()
    _, exact = outcome(plain)
    with torch.autocast("cpu", torch.bfloat16):
        (_, theirs), (_, ours) = outcome(plain), outcome(fast)

    def error(found):
        return sum((found[name] - exact[name]).norm() / exact[name].norm() for name in exact) / len(exact)

    assert 0 < error(ours) < 1.25 * error(theirs)


def test_backward_ends_at_the_lowest_adapted_layer_and_keeps_only_the_input():
    """No gradient by an input that needs none, and one tensor as wide as the input kept for the backward pass."""
    x, weight = torch.randn(50, 32), torch.randn(24, 32)
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = lora_linear.linear(x, weight, None, a, b, 0.5, 0.0)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, a, b)}
    out.sum().backward()
    assert x.grad is None
    assert a.grad is not None


@pytest.mark.parametrize("wants_x", [True, False])
def test_gradcheck(wants_x):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=wants_x)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear.linear(x, weight, bias, a, b, 0.7, 0.0), (x, a, b))
    base = torch.nn.Linear(6, 7, dtype=torch.float64).requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear.add(base(x), x, a, b, 0.7, 0.0), (x, a, b))

    def dropped(x, a, b):
        torch.manual_seed(3)
        return lora_linear.linear(x, weight, bias, a, b, 0.7, 0.4)

    assert torch.autograd.gradcheck(dropped, (x, a, b))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_equal_peft(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    make = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    options = {4: {"compute_dtype": torch.float32, "quant_type": "nf4"}, 8: {"has_fp16_weights": False}}[bits]

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(64, 64, bias=False, **options)

        def forward(self, x):
            return self.layer(x)

    net = Net().to("cpu")
    plain = get_peft_model(net, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)).train()
    layer = plain.base_model.model.layer
    x = torch.randn(8, 64, requires_grad=True)
    expected = plain(x)
    expected.square().sum().backward()
    wanted = [x.grad.clone(), layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()]
    x.grad = None
    plain.zero_grad()
    assert accelerate_lora(plain) == 1
    got = plain(x)
    got.square().sum().backward()
    found = [x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def four_bit(features=64, bias=False, dtype=torch.float32):
    """peft's LoRA over one NF4 layer, and a copy with the faster one."""
    bnb = pytest.importorskip("bitsandbytes")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = bnb.nn.Linear4bit(features, 2 * features, bias=bias, compute_dtype=dtype, quant_type="nf4")

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
    plain = get_peft_model(Net().to("cpu"), config).train()
    fast = copy.deepcopy(plain)
    assert accelerate_lora(fast) == 1
    return plain, fast


@pytest.mark.parametrize("bias", [False, True])
def test_an_opened_4bit_weight_gives_bitsandbytes_own_product_and_gradients(bias):
    found = []
    for model in four_bit(bias=bias):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        layer = model.base_model.model.layer
        found.append([out, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    for expected, got in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_opened_4bit_weight_is_let_go_of_and_the_layer_s_own_product_is_not_formed(monkeypatch):
    _, fast = four_bit(dtype=torch.bfloat16)
    base = fast.base_model.model.layer.base_layer
    monkeypatch.setattr(type(base), "forward", lambda *_: pytest.fail("formed by bitsandbytes"))
    x, kept = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fast(x)
    assert out.dtype == torch.bfloat16
    assert sum(t.numel() for t in kept) == x.numel() + 4 * 64 + 4 * 128 + 5 * 4  # x, A, B and x Aᵀ
    with torch.no_grad(), pytest.raises(BaseException, match="formed by bitsandbytes"):
        fast(x)


def test_gradcheck_of_an_opened_weight():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear.linear(x, weight.to, bias, a, b, 0.7, 0.0), (x, a, b))
