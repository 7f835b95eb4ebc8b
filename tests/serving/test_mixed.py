"""Rows of several adapters in one batch: those that peft gives, and texts that are those each adapter writes alone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import peftkit
from peftkit.evaluation.generation import encode
from peftkit.export import multi_adapter
from peftkit.inference.prompts import as_prompt, generation_config
from peftkit.serving.decoder import Sequence as Text
from peftkit.serving.service import Limits, Service
from tests import tiny


def adapted(llama, **options):
    """A model with three adapters of different ranks, whose weights are not zero."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.manual_seed(0)
    for number, name in enumerate(("default", "second", "third")):
        config = LoraConfig(r=2 + 3 * number, lora_alpha=8, init_lora_weights=False, **options)
        if name == "default":
            model = get_peft_model(base, config)
        else:
            model.add_adapter(name, config)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 7}, "use_rslora": True},
])  # fmt: skip
def test_mixed_rows_are_those_of_peft(llama, options):
    model = adapted(llama, **options)
    ids = torch.randint(0, 200, (6, 9), generator=torch.Generator().manual_seed(1))
    names = ["third", None, "default", "second", "third", None]
    expected = model(input_ids=ids, adapter_names=[name or "__base__" for name in names]).logits
    alone = model(input_ids=ids).logits
    rows, reason = multi_adapter.mix(model)
    assert (reason, model.active_adapter) == ("", "default")
    with rows.rows(names):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    with rows.rows(["second"]):
        second = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, alone), "outside, peft chooses"
    model.set_adapter("second")
    torch.testing.assert_close(second, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9)])
def test_rows_in_half_precision_are_those_of_peft(llama, shape):
    model = adapted(llama, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    ids = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(1))
    model.set_adapter("second")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        rows, _ = multi_adapter.mix(model)
        with rows.rows(["second"] * len(ids)):
            mixed = model(input_ids=ids).logits
    assert mixed.dtype == torch.bfloat16
    far = (expected - base).float().norm()
    assert (mixed - expected).float().norm() < 0.1 * far


@pytest.mark.parametrize(("options", "reason"), [
    ({"target_modules": "all-linear", "use_dora": True}, "variant of LoRA"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules besides LoRA"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "not LoRA on linear layers"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_left_to_peft(llama, options, reason):
    model = adapted(llama, **options)
    classes = [type(module) for module in model.modules()]
    rows, why = multi_adapter.mix(model)
    assert rows is None
    assert reason in why
    assert [type(module) for module in model.modules()] == classes


def test_a_model_that_answers_otherwise_when_mixed_is_not_mixed(llama, monkeypatch):
    model = adapted(llama, target_modules="all-linear")
    classes = [type(module) for module in model.modules()]
    monkeypatch.setattr(multi_adapter.RowAdapters, "mask", lambda self, ranks, low: torch.ones(low.shape[-1]))
    rows, why = multi_adapter.mix(model)
    assert rows is None
    assert "answer otherwise" in why
    assert [type(module) for module in model.modules()] == classes


def written(service, requests, alone):
    """Requests (model, prompt, tokens, options) written together, joining at different times; and what steps did."""
    steps = []
    decoder = service.decoder
    under = decoder.activate
    decoder.activate = lambda names: steps.append(list(names)) or under(names)

    async def write(number, name, prompt, tokens, options):
        await asyncio.sleep(0 if alone else 0.02 * (number % 5))
        config = generation_config(service.run.recipe, {"max_new_tokens": tokens, **options})
        ids = encode(service.run.tokenizer, as_prompt(prompt, service.run.recipe))
        text = Text(ids, config, name, stream=number % 2 == 0)
        ids = [piece.token async for piece in service.write(text) if piece.finish != "stop"]
        return service.run.tokenizer.decode(ids, skip_special_tokens=True)

    async def everything():
        if alone:
            return [await write(number, *request) for number, request in enumerate(requests)]
        return await asyncio.gather(*(write(number, *request) for number, request in enumerate(requests)))

    try:
        return asyncio.run(everything()), steps
    finally:
        decoder.activate = under


def requests_of(names, count=16, longest=60):
    draw = random.Random(0)
    options = [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"temperature": 0.0}]
    return [
        (names[n % len(names)], " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, longest))),
         draw.randint(1, 40), options[n % 3])
        for n in range(count)
    ]  # fmt: skip


def expected_texts(run, requests):
    texts = []
    for name, prompt, tokens, options in requests:
        if name == "base":
            with run.base() as base:
                texts += base.generate([prompt], max_new_tokens=tokens, **options)
        else:
            run.use_adapter("default" if name == "own" else name)
            texts += run.generate([prompt], max_new_tokens=tokens, **options)
    return texts


def test_texts_of_adapters_and_base_written_together_are_those_of_each_alone(language):
    adapters = {"second": language[1], "third": language[2]}
    service = Service(peftkit.load(language[0], adapters=adapters), "own", Limits(batch=6), with_base=True)
    requests = requests_of(["own", "second", "third", "base"])
    try:
        together, steps = written(service, requests, alone=False)
    finally:
        service.close()
    expected = expected_texts(peftkit.load(language[0], adapters=adapters, merge=False), requests)
    assert together == expected
    assert len(set(expected)) > 8
    assert service.notes == ()
    assert max(len(set(step)) for step in steps) >= 3, "several adapters had rows in one step"
    assert max(map(len, steps)) <= 6


def test_a_single_adapter_that_is_not_merged_is_served_by_mixed_layers(language):
    service = Service(peftkit.load(language[0], merge=False), "own", Limits(batch=4))
    requests = requests_of(["own"], count=5)
    try:
        together, _ = written(service, requests, alone=False)
    finally:
        service.close()
    assert service.mixed is not None
    assert together == expected_texts(peftkit.load(language[0], merge=False), requests)


def test_adapters_that_cannot_be_mixed_are_batched_by_themselves(variants):
    service = Service(peftkit.load(variants[0], adapters={"second": variants[1]}), "own", Limits(), with_base=True)
    requests = requests_of(["own", "second", "base"], count=6)
    try:
        together, steps = written(service, requests, alone=False)
    finally:
        service.close()
    assert together == expected_texts(peftkit.load(variants[0], adapters={"second": variants[1]}), requests)
    assert {len(set(step)) for step in steps} == {1}
    assert "variant of LoRA" in service.notes[0]
