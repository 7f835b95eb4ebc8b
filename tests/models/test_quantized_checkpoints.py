"""Checkpoints whose weights are quantized already: frozen bases where their kernels are, refused in words elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

from peftkit.errors import MethodError, ModelError
from peftkit.models import loading
from peftkit.models.loading import build
from peftkit.models.meta_model import build_meta_model
from peftkit.models.quantization import checkpoint
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.trace import fake_tensor_mode
from peftkit.schema.types import TaskInfo
from tests import tiny

CAUSAL = TaskInfo("causal_lm")
STYLE = {"task": {"kind": "style"}, "data": {"source": "none.csv", "max_length": 32}}
INSTALL = {
    "gptq": "pip install optimum && pip install gptqmodel --no-build-isolation",
    "awq": "pip install optimum && pip install gptqmodel --no-build-isolation",
    "hqq": "pip install hqq",
    "torchao": "pip install torchao",
    "bitsandbytes": "pip install 'peftkit[quantization]'",
}


@pytest.fixture
def llama(tmp_path):
    return tiny.tiny_llama(tmp_path / "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture
def unread(monkeypatch):
    """Fails where a weight would be read."""
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_: pytest.fail("weights were read"))


def declared(folder, **held):
    """The folder's config with a quantization that its weights claim."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "quantization_config": held}), encoding="utf-8")
    return folder


def refused(folder, **parts):
    recipe = tiny.tiny_recipe(folder, **{**STYLE, **parts})
    with pytest.raises((ModelError, MethodError)) as error:
        build(recipe, CAUSAL, load_tokenizer(recipe.model))
    return str(error.value)


@pytest.mark.parametrize("kind", INSTALL)
def test_missing_kernels_are_named_with_the_line_that_installs_them(kind, llama, unread, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    said = refused(declared(llama, quant_method=kind))
    assert f"run `{INSTALL[kind]}`" in said
    assert f"quantized with {kind}" in said


@pytest.mark.parametrize(
    ("held", "parts", "said"),
    [
        ({"quant_method": "mxfp4"}, {}, "quantized with mxfp4, which no method supports"),
        ({"bits": 4}, {}, "quantized with an unnamed method"),
        (
            {"quant_method": "gptq"},
            {"quantization": {"kind": "nf4"}},
            "already quantized with gptq; set quantization=null",
        ),
        ({"quant_method": "gptq"}, {"method": {"kind": "full"}}, "trains the base's own weights"),
        ({"quant_method": "gptq"}, {"method": {"kind": "vera"}}, "supports checkpoints quantized with bitsandbytes"),
        (
            {"quant_method": "awq"},
            {"method": {"kind": "adalora"}},
            "supports checkpoints quantized with bitsandbytes, gptq",
        ),
        (
            {"quant_method": "awq"},
            {"method": {"kind": "lora", "init_lora_weights": "pissa"}},
            "computed from unquantized weights",
        ),
        ({"quant_method": "gptq"}, {"method": {"kind": "lora", "use_dora": True}}, "method.use_dora=false"),
        ({"quant_method": "gptq"}, {"method": {"kind": "peft", "peft_type": "LOHA"}}, "LOHA needs unquantized weights"),
        (
            {"quant_method": "awq"},
            {"export": {"merge": True}},
            "weights cannot be merged with an adapter",
        ),
        ({"quant_method": "hqq"}, {}, "this version of transformers cannot"),
    ],
)
def test_what_cannot_stand_on_them_is_refused_before_weights_are_read(held, parts, said, llama, unread, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: object())
    assert said in refused(declared(llama, **held), **parts)


@pytest.mark.parametrize("method", ["lora", "oft", "prefix_tuning", "ln_tuning", "bottleneck"])
def test_methods_that_can_stand_on_gptq_are_not_refused(method, llama, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: object())
    recipe = tiny.tiny_recipe(llama, **{**STYLE, "method": {"kind": method}})
    assert checkpoint.check({"quantization_config": {"quant_method": "gptq"}}, recipe) == "gptq"


def test_hqq_is_loaded_as_soon_as_transformers_can(llama, monkeypatch):
    """transformers 5 knows the name and reads none of its weights."""
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    monkeypatch.setattr(checkpoint, "find_spec", lambda name: object())
    monkeypatch.setattr(HqqHfQuantizer, "get_weight_conversions", lambda self: [])
    recipe = tiny.tiny_recipe(llama, **STYLE)
    assert checkpoint.check({"quantization_config": {"quant_method": "hqq"}}, recipe) == "hqq"


def test_a_whole_checkpoint_is_none_of_them(llama):
    recipe = tiny.tiny_recipe(llama, **STYLE)
    assert checkpoint.check(json.loads((llama / "config.json").read_text()), recipe) is None


def test_others_cannot_be_planned(llama):
    recipe = tiny.tiny_recipe(declared(llama, quant_method="gptq", bits=4), **STYLE)
    with pytest.raises(ModelError, match="cannot be planned"), fake_tensor_mode():
        build_meta_model(recipe, CAUSAL, load_tokenizer(recipe.model), torch.float32)
