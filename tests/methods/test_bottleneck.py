"""Bottleneck adapters: on the residual branch of any architecture, equal to forwards written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.errors import MethodError
from peftkit.methods.layers import bottleneck_adapter
from peftkit.methods.layers.residual import find_branches
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, TaskInfo
from tests import tiny

LABELS = TaskInfo("single_label_classification", ("cat", "dog"))
TEXT = TaskInfo("causal_lm")
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
SMALL = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}
DECODERS = {
    "gpt2": ("GPT2Config", SMALL),
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "mistral": ("MistralConfig", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8}),
    "granite": ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.25}),
    "phi": ("PhiConfig", SIZES),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt_neox_serial": ("GPTNeoXConfig", {**SIZES, "use_parallel_residual": False}),
    "gptj": ("GPTJConfig", {**SMALL, "rotary_dim": 4}),
    "falcon": ("FalconConfig", {name: size for name, size in SIZES.items() if name != "intermediate_size"}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
ENCODERS = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", SIZES),
    "distilbert": ("DistilBertConfig", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 32}),
    "deberta": ("DebertaV2Config", SIZES),
    "mpnet": ("MPNetConfig", SIZES),
    "modernbert": ("ModernBertConfig", {**SIZES, **dict.fromkeys(["pad_token_id", "cls_token_id", "sep_token_id"], 0)}),
}
FAMILIES = {**ENCODERS, **DECODERS}
LAST_NORM = {"distilbert": "output_layer_norm"}
"""Where a post-norm block normalizes its second sum; output.LayerNorm elsewhere."""
POST_NORM = ("bert", "roberta", "distilbert", "electra", "deberta", "mpnet")
SCALED = {"granite": 0.25}
IDS = torch.randint(5, 90, (2, 13), generator=torch.Generator().manual_seed(1))


def base(family):
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, initializer_range=0.2)
    auto = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    if family in ENCODERS:
        config.num_labels = 2
    return auto.from_config(config).eval()


def adapted(model, **method):
    """A copy of the model with adapters."""
    loaded = LoadedModel(copy.deepcopy(model), None)
    METHODS.get("bottleneck").model_validate(method).apply(loaded)
    return loaded.model.eval()


def moved(model, by=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_does(family):
    model = base(family)
    expected, count = logits(model), len(find_branches(model))
    assert count == 4
    for variant, number in {"houlsby": 4, "pfeiffer": 2, "parallel": 2}.items():
        ours = adapted(model, variant=variant)
        assert len(bottleneck_adapter.adapters(ours)) == number
        assert torch.equal(logits(ours), expected), variant
        assert not torch.allclose(logits(moved(ours)), expected, atol=1e-3), variant
        bottleneck_adapter.remove(ours)
        assert torch.equal(logits(ours), expected), variant
        assert list(ours.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("variant", ["houlsby", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_adds_to_the_residual_stream_before_the_sum(family, variant):
    """A constant from the last feed-forward adapter arrives whole in what the last block makes of its stream."""
    model = base(family)
    ours = adapted(model, variant=variant, scaling=1.0)
    shift = torch.linspace(-1, 1, 32)
    last = bottleneck_adapter.adapters(ours)[-1]
    assert last.shape.branch.kind == "feed_forward"
    with torch.no_grad():
        last.up.bias.copy_(shift)

    def stream(which):
        block, seen = which.get_submodule(last.shape.branch.block), []
        if family in POST_NORM:
            norm = block.get_submodule(LAST_NORM.get(family, "output.LayerNorm"))
            handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            handle = block.register_forward_hook(
                lambda _, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
            )
        logits(which)
        handle.remove()
        return seen[0]

    difference = stream(ours) - stream(model)
    expected = (shift * SCALED.get(family, 1.0)).expand_as(difference)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)


def by_hand(adapter, h, read=None):
    """The papers' formulas, over plain tensors."""
    x = h if read is None else read
    low = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
    return h + float(adapter.scaling) * (low @ adapter.up.weight.T + adapter.up.bias)


@torch.no_grad()
def test_bert_with_houlsby_adapters_written_out():
    model = base("bert")
    ours = moved(adapted(model, variant="houlsby", size=7, scaling=0.5, init="normal"))
    clean, here = model.bert, ours.bert
    h = clean.embeddings(input_ids=IDS)
    for block, with_adapters in zip(clean.encoder.layer, here.encoder.layer):
        after = with_adapters.bottleneck_adapters
        attended = block.attention.output.dense(block.attention.self(h)[0])
        h = block.attention.output.LayerNorm(by_hand(after.attention, attended) + h)
        fed = block.output.dense(nn.functional.gelu(block.intermediate.dense(h)))
        h = block.output.LayerNorm(by_hand(after.feed_forward, fed) + h)
    expected = ours.classifier(torch.tanh(clean.pooler.dense(h[:, 0])))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer", "parallel"])
def test_llama_written_out(variant):
    model = base("llama")
    ours = moved(adapted(model, variant=variant, size=5))
    inner, h = model.model, model.model.embed_tokens(IDS)
    positions = inner.rotary_emb(h, torch.arange(IDS.shape[1])[None])
    for block, with_adapters in zip(inner.layers, ours.model.layers):
        after = with_adapters.bottleneck_adapters
        attended = block.self_attn(block.input_layernorm(h), position_embeddings=positions, attention_mask=None)[0]
        h = h + (by_hand(after.attention, attended) if variant == "houlsby" else attended)
        read = block.post_attention_layernorm(h)
        fed = block.mlp.down_proj(nn.functional.silu(block.mlp.gate_proj(read)) * block.mlp.up_proj(read))
        h = h + by_hand(after.feed_forward, fed, read if variant == "parallel" else None)
    expected = model.lm_head(inner.norm(h))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert {adapter.scaling for adapter in bottleneck_adapter.adapters(ours)} == {4.0 if variant == "parallel" else 1.0}


def test_placement_on_a_model_without_weights_is_the_same():
    for family in ("bert", "distilbert", "gpt2", "llama", "gemma2", "phi", "gpt_neox"):
        model = base(family)
        auto = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
        with torch.device("meta"):
            empty = auto.from_config(model.config)
        assert find_branches(empty) == find_branches(model), family
        METHODS.get("bottleneck")().apply(LoadedModel(empty, None))
        assert {adapter.up.weight.device.type for adapter in bottleneck_adapter.adapters(empty)} == {"meta"}


def test_what_has_no_residual_sums_is_refused():
    class Plain(transformers.BertForSequenceClassification):
        pass

    model = Plain(transformers.BertConfig(**SIZES)).eval()
    for block in model.bert.encoder.layer:
        block.forward = lambda hidden, *_, **__: torch.tanh(hidden)
    with pytest.raises(MethodError, match=r"method.kind=bottleneck: Plain: no residual sum was found in its blocks"):
        METHODS.get("bottleneck")().apply(LoadedModel(model, None))


def first(**method):
    return bottleneck_adapter.adapters(adapted(base("bert"), **method))[0]


def test_size_and_reduction_factor_give_the_width():
    assert first().down.weight.shape == (2, 32)
    assert first(reduction_factor=4).down.weight.shape == (8, 32)
    assert first(reduction_factor=4, size=5).up.weight.shape == (32, 5)


def test_nonlinearity_scaling_and_dropout_shape_the_output():
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, function in {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu,
                           "tanh": torch.tanh}.items():  # fmt: skip
        adapter = moved(first(nonlinearity=name, size=6, scaling=2.5))
        expected = 2.5 * adapter.up(function(adapter.down(x)))
        torch.testing.assert_close(adapter(x), expected)
        found[name] = adapter
    learned = first(scaling="learned")
    assert learned.scaling.requires_grad
    assert learned.scaling.item() == 1.0
    dropping = moved(first(dropout=0.5, size=6))
    assert torch.equal(dropping.eval()(x), dropping(x))
    assert not torch.equal(dropping.train()(x), dropping(x))


def test_init_normal_is_near_the_base_but_not_it():
    model = base("bert")
    expected, near = logits(model), logits(adapted(model, init="normal"))
    assert not torch.equal(near, expected)
    assert (near - expected).abs().max() < 0.05 * expected.abs().max()
    weight = first(init="normal", size=16).down.weight
    assert 0.007 < weight.std() < 0.011
    assert weight.abs().max() <= 0.02


def test_layers_choose_blocks():
    def blocks(**method):
        return [
            adapter.shape.branch.block[-1] for adapter in bottleneck_adapter.adapters(adapted(base("bert"), **method))
        ]

    assert blocks() == ["0", "1"]
    assert blocks(layers=-1) == ["1"]
    assert blocks(layers=(0,), variant="houlsby") == ["0", "0"]
    with pytest.raises(MethodError, match=r"method.layers=2: the model has 2 blocks, numbered 0 to 1"):
        blocks(layers=2)


METHOD = {"kind": "bottleneck", "variant": "houlsby", "nonlinearity": "gelu"}
"""With a nonlinearity that never dies."""


def made(folder, info, **parts):
    task = {"kind": "classification"} if info is LABELS else {"kind": "style"}
    recipe = tiny.tiny_recipe(folder, task=task, **{"method": METHOD, **parts})
    return build(recipe, info, load_tokenizer(recipe.model))


def test_a_copied_model_has_adapters_of_its_own():
    ours = moved(adapted(base("llama"), variant="parallel"))
    before = logits(ours)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for adapter in bottleneck_adapter.adapters(ours):
            adapter.up.weight.zero_()
    assert torch.equal(logits(copied), before)
    assert not torch.equal(logits(ours), before)


@pytest.mark.parametrize("quantization", [None, {"kind": "nf4"}, {"kind": "int8"}], ids=["bf16", "nf4", "int8"])
@pytest.mark.parametrize("base_name", ["bert", "llama"])
def test_dtypes_gradients_and_evaluation_in_between(request, base_name, quantization):
    folder, info = request.getfixturevalue(base_name), LABELS if base_name == "bert" else TEXT
    loaded = made(folder, info, quantization=quantization, model={"dtype": "bfloat16"})
    model = moved(loaded.model, 0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if set(name.split(".")) & set(loaded.head_names)}
    assert {name for name in trained - heads if ".bottleneck_adapters." not in name} == set()
    assert len(trained - heads) == 4 * 4
    assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}

    def gradients(mode):
        model.train(mode == "train")
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(mode == "train"):
            loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float().square().mean()
        if mode != "train":
            return {}
        model.zero_grad()
        loss.backward()
        return {name: model.get_parameter(name).grad.clone() for name in trained}

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = gradients("train")
    gradients("eval")
    after = gradients("train")
    assert all(torch.equal(before[name], after[name]) for name in trained)
    assert all(grad.abs().max() > 0 for name, grad in before.items() if ".bottleneck_adapters." in name)


@pytest.mark.parametrize("variant", ["houlsby", "parallel"])
def test_checkpointed_gradients_are_the_same(llama, variant):
    found = {}
    for mode in ("off", "selective", "full"):
        method = {"kind": "bottleneck", "variant": variant, "dropout": 0.2}
        model = moved(made(llama, TEXT, method=method, training={"gradient_checkpointing": mode}).model)
        torch.manual_seed(0)
        model.train()(input_ids=IDS).logits.square().mean().backward()
        found[mode] = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    for mode in ("selective", "full"):
        assert all(torch.equal(found[mode][name], grad) for name, grad in found["off"].items()), mode
