"""Text from a loaded run: options, prompts as each task reads them, and several adapters on one base."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from peftkit.errors import DataError, ModelError, RecipeError, RunError
from peftkit.evaluation import generation
from peftkit.inference.trained_model import load
from peftkit.methods.layers.fast_lora import accelerate_lora
from peftkit.schema.recipe import GenerationConfig
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import TEXTS, exported

TEXT = TaskInfo("causal_lm")
OFF = {"export": {"prove": False}}
PROMPTS = ["the king said", "who is the player", "oil"]
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Exports on one base: instruction (with a system prompt), style on other layers, a whole model, a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    parts = {
        "chat": {"task": {"kind": "instruction"}, "data": {"system": "be good"},
                 "evaluation": {"generation": {"max_new_tokens": 5}}},
        "kjv": {"task": {"kind": "style"}, "method": {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]}},
        "full": {"task": {"kind": "style"}, "method": {"kind": "full"}},
    }  # fmt: skip
    made = {name: exported(folder / name, base, TEXT, **OFF, **given)[0] for name, given in parts.items()}
    return {**made, "classifier": exported(folder / "classifier", base, **OFF)[0]}


def direct(run, prompts, **options):
    """The same model asked without LoadedRun's help."""
    config = GenerationConfig(**{"max_new_tokens": 8, **options})
    return generation.generate(run.model, run.tokenizer, prompts, config)


def test_style_continues_and_instruction_answers_under_its_system_prompt(runs):
    style, chat = load(runs["kjv"]), load(runs["chat"])
    assert style.generate(PROMPTS, **SHORT) == direct(style, PROMPTS)
    turns = [[{"role": "system", "content": "be good"}, {"role": "user", "content": text}] for text in PROMPTS]
    answers = direct(chat, turns)
    assert chat.generate(PROMPTS, **SHORT) == answers
    assert chat.generate([turn[1:] for turn in turns], **SHORT) == answers
    assert chat.generate(turns[0][1:], **SHORT) == chat.generate(PROMPTS[0], **SHORT) == answers[:1]
    own = [{"role": "system", "content": "be bad"}, {"role": "user", "content": "the king said"}]
    assert chat.generate(own, **SHORT) == direct(chat, [own])
    assert chat.generate([]) == []


def test_stream_joined_is_what_generate_returns(runs):
    chat = load(runs["chat"])
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"},
               {"role": "user", "content": "who"}]  # fmt: skip
    assert "".join(chat.stream(history, **SHORT)) == chat.generate(history, **SHORT)[0]
    assert "".join(chat.stream("oil", **SHORT)) == chat.generate("oil", **SHORT)[0]


def test_options_stand_over_the_recipes_and_configured_keeps_them(runs):
    chat = load(runs["chat"])
    assert chat.generate("oil") == chat.generate("oil", max_new_tokens=5)
    assert len(chat.generate("oil", max_new_tokens=30)[0]) > len(chat.generate("oil")[0])
    drawn = {seed: chat.generate("oil", temperature=2.0, seed=seed) for seed in range(3)}
    assert len({tuple(text) for text in drawn.values()}) == 3
    other = chat.configured(temperature=2.0, seed=1)
    assert other.generate("oil") == drawn[1]
    assert other.generate("oil", seed=2) == drawn[2]
    assert other.model is chat.model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"samples": 3}, "no option 'samples'"),
        ({"temperature": -1}, "generation: temperature: .*found -1"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_wrong_options(runs, options, said):
    with pytest.raises(RecipeError, match=said):
        load(runs["chat"]).generate("oil", **options)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[{"role": "usr", "content": "a"}]], "prompt 1: turn 1: unknown role 'usr': did you mean 'user'"),
        (["a", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], "prompt 2: turn 2.*user's"),
        ([3], "prompt 1: expected a list of turns, found int"),
        ([[]], "prompt 1: the conversation is empty"),
    ],
)
def test_wrong_prompts(runs, prompts, said):
    with pytest.raises(DataError, match=said):
        load(runs["chat"]).generate(prompts)


def test_a_classifier_writes_nothing(runs):
    run = load(runs["classifier"])
    for ask in (run.generate, run.stream):
        with pytest.raises(RunError, match="classification writes no text"):
            ask("oil")


@pytest.mark.parametrize("fast", [False, True])
def test_each_of_several_adapters_writes_as_it_does_alone(runs, fast):
    alone = {name: load(runs[name]).generate(PROMPTS, **SHORT) for name in ("chat", "kjv")}
    both = load(runs["chat"], adapters={"kjv": runs["kjv"]})
    if fast:
        assert accelerate_lora(both.model) > 0
    assert both.adapters == ("default", "kjv")
    for name, run in (("default", "chat"), ("kjv", "kjv"), ("default", "chat")):
        both.use_adapter(name)
        assert both.adapter == name
        assert both.generate(PROMPTS, **SHORT) == alone[run]
    assert alone["chat"] != alone["kjv"]
    assert not any(parameter.requires_grad for parameter in both.model.parameters())


def test_layers_made_fast_before_another_adapter_comes(runs):
    alone = load(runs["chat"]).generate(PROMPTS, **SHORT)
    both = load(runs["kjv"])
    accelerate_lora(both.model)
    both.add_adapter(runs["chat"], "chat")
    both.use_adapter("chat")
    assert both.generate(PROMPTS, **SHORT) == alone


def test_without_the_adapter_the_base_writes(runs, base):
    from transformers import AutoModelForCausalLM

    run = load(runs["kjv"], adapters={"chat": runs["chat"]})
    plain = generation.generate(
        AutoModelForCausalLM.from_pretrained(base), run.tokenizer, PROMPTS, GenerationConfig(**SHORT)
    )
    before = run.generate(PROMPTS, **SHORT)
    with run.base() as off:
        assert off.generate(PROMPTS, **SHORT) == plain != before
    assert run.generate(PROMPTS, **SHORT) == before
    run.use_adapter("chat")
    with pytest.raises(ZeroDivisionError), run.base():
        _ = 1 / 0
    assert run.adapter == "chat"
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    with pytest.raises(RunError, match="method 'full' trained the base itself"), load(runs["full"]).base():
        pass


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../kjv", "cannot name an adapter"),
        ("a.b", "cannot name an adapter"),
        ("", "cannot name an adapter"),
        ("a" * 65, "cannot name an adapter"),
        ("default", "called 'default' already"),
        ("weight", "the model uses the name"),
        ("lora", "the model uses the name"),
        ("keys", "the model uses the name"),
        ("q_proj", "the model uses the name"),
    ],
)
def test_names_that_cannot_be_used(runs, name, said):
    run = load(runs["chat"])
    with pytest.raises(RunError, match=said):
        run.add_adapter(runs["kjv"], name)
    assert run.adapters == ("default",)
    assert run.others == {}


def test_unknown_adapters_are_told_by_the_nearest_name(runs):
    run = load(runs["chat"], adapters={"shakespeare": runs["kjv"]})
    with pytest.raises(RunError, match="did you mean 'shakespeare'"):
        run.use_adapter("shakespear")
    with pytest.raises(RunError, match="called 'shakespeare' already"):
        run.add_adapter(runs["kjv"], "shakespeare")


def test_foreign_adapters_are_refused_and_leave_nothing_behind(runs, tmp_path):
    other = tiny.tiny_llama(tmp_path / "other", rope_theta=500.0)
    foreign, _ = exported(tmp_path / "foreign", other, TEXT, task={"kind": "style"}, **OFF)
    run = load(runs["chat"])
    before = run.generate(PROMPTS, **SHORT)
    for path, error, said in (
        (foreign, ModelError, "must have been trained on it"),
        (runs["full"], ModelError, "only adapters can share"),
        (runs["classifier"], ModelError, r"trained for single label classification \(cat, dog, eel\)"),
        (tmp_path / "nowhere", RunError, "no such folder"),
    ):
        with pytest.raises(error, match=said):
            run.add_adapter(path, "new")
        with pytest.raises(error, match=said):
            load(runs["chat"], adapters={"new": path})
    assert run.adapters == ("default",)
    assert run.generate(PROMPTS, **SHORT) == before


def test_a_damaged_adapter_is_taken_out_again(runs, tmp_path, base):
    from safetensors.torch import load_file, save_file

    damaged, _ = exported(tmp_path / "damaged", base, TEXT, task={"kind": "style"}, **OFF)
    file = damaged / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file, metadata={"format": "pt"})
    run = load(runs["chat"])
    before = run.generate(PROMPTS, **SHORT)
    with pytest.raises(ModelError, match="lacks 1 weights"):
        run.add_adapter(damaged, "new")
    assert run.adapters == ("default",)
    assert run.generate(PROMPTS, **SHORT) == before
    run.add_adapter(runs["kjv"], "new")


def test_classifiers_share_a_base_each_with_its_own_head(tmp_path):
    base = tiny.tiny_bert(tmp_path / "base")
    one, _ = exported(tmp_path / "one", base, **OFF)
    two, _ = exported(tmp_path / "two", base, method={"kind": "lora", "rank": 2}, **OFF)
    both = load(one, adapters={"two": two})
    np.testing.assert_allclose(both.logits(TEXTS), load(one).logits(TEXTS), rtol=1e-5, atol=1e-6)
    both.use_adapter("two")
    np.testing.assert_allclose(both.logits(TEXTS), load(two).logits(TEXTS), rtol=1e-5, atol=1e-6)


def test_adapters_are_held_in_the_fp32_in_which_they_were_trained(tmp_path, base):
    half, made = exported(tmp_path / "half", base, TEXT, task={"kind": "style"}, model={"dtype": "bfloat16"}, **OFF)
    run = load(half, adapters={"again": half})
    kinds = {name: tensor.dtype for name, tensor in run.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lora" not in name} == {torch.bfloat16}
    saved = {name: tensor for name, tensor in made.loaded.model.named_parameters() if "lora" in name}
    for name, tensor in run.model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(tensor, saved[name.replace(".again.", ".default.")].detach(), rtol=0, atol=0)


def test_metrics_and_recipe_stay_those_of_the_run(runs):
    run = load(runs["chat"], adapters={"kjv": runs["kjv"]})
    run.use_adapter("kjv")
    assert run.recipe.task.kind == "instruction"
    assert json.loads((runs["chat"] / "metrics.json").read_text()) == run.metrics
