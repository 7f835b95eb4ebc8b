"""Bases that bitsandbytes saved, in 4 and in 8 bits: trained over, resumed, proven, predicted with by a fresh process,
and planned byte for byte."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted, UserError
from peftkit.models.loading import build
from peftkit.models.meta_model import build_meta_model
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.memory import persistent_memory
from peftkit.planning.trace import fake_tensor_mode
from peftkit.schema.types import TaskInfo
from tests import tiny, warm
from tests.conftest import topic_rows

pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")

CAUSAL = TaskInfo("causal_lm")
CLASSES = TaskInfo("single_label_classification", ("business", "science", "sports"))
WIDE = {"hidden_size": 64, "intermediate_size": 128}
HELD = {
    "nf4-double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
TEXTS = ["the king said no", "market and stock of the bank", "a game"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by kind and model: a decoder with its output embeddings, an encoder without a head, as anyone saves them
    with transformers."""
    place = tmp_path_factory.mktemp("packed")
    whole = {
        "llama": (tiny.tiny_llama(place / "llama", **WIDE), AutoModelForCausalLM, "chatml"),
        "bert": (tiny.tiny_bert(place / "bert", **WIDE), AutoModel, "wordpiece"),
    }
    found = {}
    for name, (folder, auto, tokenizer) in whole.items():
        for kind, held in HELD.items():
            made = tiny.tiny_tokenizer(place / f"{name}-{kind}", tokenizer)
            auto.from_pretrained(folder, quantization_config=held).save_pretrained(made)
            found[name, kind] = made
    return found


def rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in topic_rows(36)))
    return file


def recipe_of(folder, tmp_path, task, **parts):
    fields = {
        "task": {"kind": task},
        "model": {"source": str(folder), "dtype": "bfloat16"},
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "data": {"source": str(rows(tmp_path)), "max_length": 32},
        "training": {"epochs": 1, "batch_size": 8, "threads": 1, "learning_rate": 1e-2},
        "evaluation": {"generation": {"samples": 0}, "baselines": ()},
        "output_dir": str(tmp_path / "runs"),
    }
    return tiny.tiny_recipe(folder, **{**fields, **parts})


def adapter(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


PREDICT = """
import json, sys, peftkit
from peftkit.export import card
run, texts = peftkit.load(sys.argv[1]), json.loads(sys.argv[2])
said = run.logits(texts).tolist() if run.labels else run.generate(texts, max_new_tokens=8)
code = card.usage(run.manifest).code.replace("path/to/this/folder", str(run.path))
exec(compile(code, "card", "exec"), {})  # plain peft and transformers; the card is ours
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("model", "kind", "task"), [("llama", "nf4-double", "style"), ("bert", "int8", "classification")]
)
def test_training_over_it_is_resumed_proven_and_predicted_with_by_a_fresh_process(
    model, kind, task, saved, tmp_path, monkeypatch
):
    from peftkit.training.interruptions import StopRequest

    recipe = recipe_of(saved[model, kind], tmp_path, task)
    whole = peftkit.train(recipe, quiet=True)
    assert json.loads((whole.adapter / "proof.json").read_text())["passed"]
    asked = []
    unproven = replace(recipe, export={"prove": False})
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "code", property(lambda self: 15 if (asked.append(1), len(asked) == 3)[1] else 0))
        with pytest.raises(Interrupted):
            peftkit.train(unproven, quiet=True)
    assert adapter(peftkit.train(unproven, resume=True, quiet=True)) == adapter(whole)
    done = warm.run(
        [sys.executable, "-c", PREDICT, str(whole.path), json.dumps(TEXTS)], capture_output=True, text=True, check=True
    )
    run = peftkit.load(whole.path)
    here = run.logits(TEXTS).tolist() if run.labels else run.generate(TEXTS, max_new_tokens=8)
    assert json.loads(done.stdout.splitlines()[-1]) == here
    assert (run.merge_state.merged, run.merge_state.reason) == (False, "its base is quantized")


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize(
    ("model", "task"), [("llama", "style"), ("llama", "classification"), ("bert", "classification")]
)
def test_planned_bytes_are_those_of_the_weights_that_are_loaded(kind, model, task, saved):
    real, planned = both(saved[model, kind], CAUSAL if task == "style" else CLASSES, task)
    linears = 2 * 7 if model == "llama" else 2 * 6 + 1  # a pooler was saved packed as well
    integers = {name for name, p in real.named_parameters() if not p.is_floating_point()}
    assert len(integers) == linears
    assert not any("score" in name or "classifier" in name or "lora_" in name for name in integers)
    assert table(planned) == table(real)
    held = persistent_memory(planned, "adamw")
    frozen = [p for p in real.parameters() if not p.requires_grad]
    assert held.frozen == sum(p.numel() * p.element_size() for p in (*frozen, *real.buffers()))
    assert held.constants == tiny.scale_bytes(real)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"quantization": {"kind": "nf4"}}, "already quantized with bitsandbytes; set quantization=null"),
        ({"method": {"kind": "full"}}, "trains the base's own weights"),
    ],
)
def test_what_is_refused_in_training_is_refused_in_a_plan(parts, said, saved):
    recipe = tiny.tiny_recipe(saved["llama", "nf4"], task={"kind": "style"}, **parts)
    with pytest.raises(UserError, match=said), fake_tensor_mode():
        build_meta_model(recipe, CAUSAL, load_tokenizer(recipe.model), torch.float32)


def test_where_no_weights_were_fetched_the_config_says_what_is_whole(saved, tmp_path):
    for file in saved["llama", "nf4"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "down_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = tiny.tiny_recipe(tmp_path, task={"kind": "style"})
    with fake_tensor_mode():
        model = build_meta_model(recipe, CAUSAL, load_tokenizer(recipe.model), torch.float32).model
    packed = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 2 * 6
    assert not any("down_proj" in name for name in packed)


def both(folder, info, task):
    recipe = tiny.tiny_recipe(folder, task={"kind": task}, method={"kind": "lora", "rank": 4}, model={"pooling": "own"})
    tokenizer = load_tokenizer(recipe.model)
    with fake_tensor_mode():
        planned = build_meta_model(recipe, info, tokenizer, torch.float32).model
    return build(recipe, info, tokenizer).model, planned


def table(model):
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_products_are_in_the_runs_own_dtype_and_blocks_of_any_size_are_planned(saved, tmp_path):
    """The checkpoint says float32, and the run bf16; its scales are for 32 weights each here."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit

    folder = tmp_path / "blocks"
    folder.mkdir()
    for file in saved["llama", "nf4"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        numbers = tensors[name].numel() * 2
        shape = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))["shape"]
        packed, state = quantize_4bit(
            torch.randn(numbers, generator=generator).view(shape), blocksize=32, quant_type="nf4"
        )
        for key, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = tensor
        tensors[name] = packed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    real, planned = both(folder, CAUSAL, "style")
    held = persistent_memory(planned, "adamw")
    assert held.constants == tiny.scale_bytes(real) > 2 * 7 * 4 * 64 * 64 // 64
    recipe = recipe_of(folder, tmp_path, "style")
    model = build(recipe, CAUSAL, load_tokenizer(recipe.model)).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert {layer.weight.quant_state.blocksize for layer in layers} == {32}
