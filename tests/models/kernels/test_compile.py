"""Compiled blocks learn what plain ones do, are compiled once for all blocks and lengths, and leave evaluation be."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkit
from peftkit.errors import RecipeError
from peftkit.models import packing
from peftkit.models.kernels import compile
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import replace
from peftkit.schema.types import TaskInfo
from tests import tiny

LABELS = TaskInfo("single_label_classification", ("cat", "dog"))
TEXT = TaskInfo("causal_lm")
BASES = {
    "bert": (
        tiny.tiny_bert,
        LABELS,
        {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "distilbert": (
        tiny.tiny_distilbert,
        LABELS,
        {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "llama": (tiny.tiny_llama, TEXT, {"num_hidden_layers": 3}),
    "gpt2": (tiny.tiny_gpt2, TEXT, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
WAYS = {
    "lora": {"method": {"kind": "lora", "rank": 4}},
    "full": {"method": {"kind": "full"}},
    "bottleneck": {"method": {"kind": "bottleneck"}},
    "checkpointed": {"method": {"kind": "lora", "rank": 4}, "training": {"gradient_checkpointing": "full"}},
    "nf4": {"method": {"kind": "lora", "rank": 4}, "quantization": {"kind": "nf4"}},
    "bf16": {"method": {"kind": "lora", "rank": 4}, "model": {"dtype": "bfloat16"}},
}
works = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler():
    """Asked when a test needs it: the answer takes as long as several tests."""
    if reason := compile._failure("cpu"):
        pytest.skip(f"torch's compiler does not work here: {reason}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("compiled")
    return {name: (make(place / name, **config), info) for name, (make, info, config) in BASES.items()}


def made(folders, base, way, compile):
    folder, info = folders[base]
    task = {"kind": "classification"} if info is LABELS else {"kind": "style"}
    parts = {"task": task, **WAYS[way]}
    parts["training"] = {**parts.get("training", {}), "compile": compile}
    recipe = tiny.tiny_recipe(folder, **parts)
    model = build(recipe, info, load_tokenizer(recipe.model)).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, recipe.model.dtype == "bfloat16"


def learned(model, half, rows=3, tokens=17):
    """Logits and gradients of one training pass."""
    ids = torch.randint(5, 90, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **packing.no_cache(model)}
        logits = model.train()(**given).logits.float()
        logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@works
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_logits_and_gradients_are_those_of_the_plain_model(folders, base, way):
    (plain, half), (fast, _) = made(folders, base, way, False), made(folders, base, way, True)
    share = 0.1 if half or way == "nf4" else 1e-4
    before = graphs()
    for tokens in (17, 9, 30):
        (wanted, right), (found, gradients) = learned(plain, half, tokens=tokens), learned(fast, half, tokens=tokens)
        assert (found - wanted).abs().max() <= share * wanted.abs().max()
        assert right.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient - right[name]).norm() <= share * right[name].norm() + 1e-6, (
                name
            )  # that of keys' biases is zero
    # the first block's input needs no gradient where only adapters learn; all other blocks and lengths share one graph
    assert 1 <= graphs() - before <= 2
    assert plain.state_dict().keys() == fast.state_dict().keys()


def graphs():
    """How many pieces of code torch has compiled so far."""
    from torch._dynamo.utils import counters

    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@works
def test_evaluation_and_generation_stay_uncompiled(folders):
    (plain, _), (fast, _) = made(folders, "llama", "lora", False), made(folders, "llama", "lora", True)
    before = graphs()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert torch.equal(fast.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
        assert torch.equal(
            fast.generate(input_ids=ids, max_new_tokens=4, do_sample=False),
            plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False),
        )
    with torch.compiler.set_stance("force_eager"):
        uncounted, wanted = learned(fast, False)[0], learned(plain, False)[0]
    assert torch.equal(uncounted, wanted)
    assert graphs() == before


@pytest.mark.slow
@works
def test_a_copy_is_compiled_and_is_a_model_of_its_own(folders):
    model, _ = made(folders, "gpt2", "full", True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert learned(model, False)[0].abs().max() > 0
    assert learned(other, False)[0].abs().max() == 0


def adapter(run):
    return run.path / "adapter" / "adapter_model.safetensors"


@pytest.fixture
def short(small_recipe):
    """A recipe without dropout, whose compiled and plain runs see the same numbers."""
    return replace(small_recipe, model={"dropout": 0.0}, training={"epochs": 1}, evaluation={"baselines": []})


@works
@pytest.mark.slow
def test_a_compiled_run_learns_the_same(short):
    from safetensors.torch import load_file

    before = graphs()
    fast = peftkit.train(replace(short, training={"compile": True}), quiet=True)
    assert graphs() > before
    assert fast.metrics["training"]["flops_per_token"] > 0
    wanted, found = load_file(adapter(peftkit.train(short, quiet=True))), load_file(adapter(fast))
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(wanted[name], found[name], atol=1e-3) for name in wanted)


@works
@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bytes(short, monkeypatch):
    from peftkit.training.interruptions import StopRequest

    recipe = replace(short, training={"compile": True})
    whole = peftkit.train(recipe, quiet=True)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "code", property(lambda self: 15 if (asked.append(1), len(asked) == 5)[1] else 0))
        with pytest.raises(peftkit.errors.Interrupted):
            peftkit.train(recipe, quiet=True)
    assert adapter(peftkit.train(recipe, resume=True, quiet=True)).read_bytes() == adapter(whole).read_bytes()


def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(small_recipe, monkeypatch):
    recipe = replace(small_recipe, training={"compile": True})
    monkeypatch.setattr(compile, "_failure", lambda device: "no C++ compiler was found")
    monkeypatch.setattr("peftkit.run._data", lambda *given: pytest.fail("something was loaded"))
    with pytest.raises(RecipeError, match=r"does not work on cpu here \(no C\+\+ compiler was found\)"):
        peftkit.train(recipe, quiet=True)
    with pytest.raises(RecipeError, match="selective finds no matmuls"):
        peftkit.train(replace(recipe, training={"gradient_checkpointing": "selective"}), quiet=True)
    with pytest.raises(RecipeError, match="sharded over processes"):
        compile.check("cpu", "off", sharded=True)


def test_the_probe_tells_what_is_missing(monkeypatch):
    def broken(function):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    assert compile._failure.__wrapped__("cpu") == "InvalidCxxCompiler: no working C++ compiler"
