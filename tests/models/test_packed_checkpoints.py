"""Bases that GPTQ, AWQ and torchao have quantized, made here with their own tools where those are installed: trained
over, proven, and predicted with by a fresh process; an evaluation leaves their gradients alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftkit
from peftkit.models import dtypes
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny, warm

CAUSAL = TaskInfo("causal_lm")
KINDS = ("torchao", "gptq")
TEXTS = ["the king said no", "a game"]
CALIBRATION = ["the king said no to the lord of the world and the day"] * 8
PREDICT = """
import json, sys, peftkit
print(json.dumps(peftkit.load(sys.argv[1]).generate(json.loads(sys.argv[2]), max_new_tokens=8)))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The folder of a kind's checkpoint; skips where its tools are not installed."""
    place = tmp_path_factory.mktemp("packed")
    base = tiny.tiny_llama(place / "llama", hidden_size=128, intermediate_size=256)
    made = {}

    def folder(kind):
        if kind not in made:
            held = {"torchao": torchao, "gptq": gptq}[kind](base)
            model = AutoModelForCausalLM.from_pretrained(
                base, quantization_config=held, dtype="float32", device_map="cpu"
            )
            model.save_pretrained(place / kind)
            made[kind] = tiny.tiny_tokenizer(place / kind, "chatml")
        return made[kind]

    return folder


def torchao(base):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def gptq(base):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    from transformers import GPTQConfig

    tokenizer = AutoTokenizer.from_pretrained(base)
    return GPTQConfig(bits=4, dataset=CALIBRATION, tokenizer=tokenizer, group_size=32, backend="gptq_torch")


def recipe_of(folder, tmp_path, dtype, **method):
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "".join(f"the king said {number} no to the lord\n" for number in range(24)))
    return tiny.tiny_recipe(
        folder,
        task={"kind": "style"},
        model={"source": str(folder), "dtype": dtype},
        data={"source": str(file), "max_length": 32},
        method={"kind": "lora", "rank": 4, **method},
        training={"max_steps": 4, "batch_size": 4, "threads": 1, "learning_rate": 1e-2, "log_every": 1},
        evaluation={"generation": {"samples": 0}},
        output_dir=str(tmp_path / "runs"),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_over_proven_and_predicted_with_by_a_fresh_process(kind, dtype, packed, tmp_path):
    run = peftkit.train(recipe_of(packed(kind), tmp_path, dtype), quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    here = peftkit.load(run.path).generate(TEXTS, max_new_tokens=8)
    command = [sys.executable, "-c", PREDICT, str(run.path), json.dumps(TEXTS)]
    done = warm.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_before_and_after_an_evaluation(kind, dtype, packed, tmp_path):
    """Kernels that only infer, taken at the first evaluation, would cut the chain at every layer."""
    recipe = recipe_of(packed(kind), tmp_path, dtype, init_lora_weights="gaussian")
    model = build(recipe, CAUSAL, load_tokenizer(recipe.model)).model
    held = getattr(torch, dtype)
    ids = torch.arange(3, 19)[None]

    def gradients():
        model.train()
        model.zero_grad()
        with dtypes.autocast(held):
            linear_cross_entropy.loss(model, {"input_ids": ids, "labels": ids}).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def evaluated():
        model.eval()
        with torch.no_grad(), dtypes.autocast(held):
            linear_cross_entropy.loss(model, {"input_ids": ids, "labels": ids})

    evaluated()  # the first pass of all, as the trials of a run are
    first = gradients()
    evaluated()
    again = gradients()
    assert len(first) == 2 * 2 * 7
    assert all(torch.equal(first[name], again[name]) for name in first)
    # B starts at 0: its gradient in the first block passes every later layer's frozen weights
    whole = against_whole_weights(model, gradients, held)
    for name, gradient in first.items():
        if "lora_B" in name:
            assert torch.linalg.norm(gradient - whole[name]) < 0.2 * torch.linalg.norm(whole[name]), name


def against_whole_weights(model, gradients, dtype):
    """The gradients where each packed layer is torch's own, holding what the packed one multiplies by."""
    for module in list(model.modules()):
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        with torch.no_grad(), dtypes.autocast(torch.float32):
            weight = base(torch.eye(base.in_features)).T.float()
        plain = torch.nn.Linear(base.in_features, base.out_features, bias=False)
        plain.weight = torch.nn.Parameter(weight.clone().to(dtype), requires_grad=False)
        module.base_layer = plain
        if hasattr(module, "quant_linear_module"):
            module.quant_linear_module = plain
    return gradients()
