"""Whole runs of language models: figures and texts before and after, packed where the model can."""

from __future__ import annotations

import json

import pytest

import peftkit
from peftkit import replace
from peftkit.evaluation import generation
from peftkit.schema.recipe import GenerationConfig, Recipe


@pytest.fixture
def instruct(llama, tmp_path):
    """Forty questions whose answers can be learned in a few steps."""
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {n % 5} and {n}", "input": "", "output": f"it is {n % 5}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.parse(
        {
            "name": "instruct",
            "model": {"source": str(llama), "dtype": "float32"},
            "data": {"source": str(file), "max_length": 64},
            "task": "instruction",
            "method": {"kind": "lora", "rank": 8},
            "training": {"epochs": 3, "batch_size": 8, "learning_rate": 2e-2, "threads": 1, "log_every": 2},
            "evaluation": {"generation": {"max_new_tokens": 8, "samples": 2}},
            "export": {"prove": False},
            "tracking": [],
            "output_dir": str(tmp_path / "runs"),
        }
    )


def test_a_language_model_learns_and_its_loss_is_per_scored_token(instruct):
    run = peftkit.train(instruct, quiet=True)
    assert run.metrics["test"]["loss"] < run.metrics["zero_shot"]["loss"] - 1
    assert run.metrics["test"]["perplexity"] == pytest.approx(2.718281828 ** run.metrics["test"]["loss"], rel=1e-6)
    first = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 10, "a mean over tokens, not a sum"


def test_samples_and_prompts_are_written_before_and_after(instruct):
    recipe = replace(instruct, evaluation={"generation": {"samples": 3, "prompts": ("say 1",), "max_new_tokens": 4}})
    run = peftkit.train(recipe, quiet=True)
    rows = [json.loads(line) for line in (run.path / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[-1]["prompt"] == [{"role": "user", "content": "say 1"}]
    assert any(row["base"] != row["finetuned"] for row in rows)
    none = replace(instruct, evaluation={"generation": {"samples": 0}}, training={"max_steps": 1})
    assert not (peftkit.train(none, quiet=True).path / "generations.jsonl").exists()


def test_a_repetition_penalty_changes_the_text(llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    plain = generation.generate(model, tokenizer, ["the king"], GenerationConfig(max_new_tokens=24))
    penal = generation.generate(
        model, tokenizer, ["the king"], GenerationConfig(max_new_tokens=24, repetition_penalty=50.0)
    )
    assert plain != penal


def test_packing_gives_way_to_batches_by_length_where_a_model_cannot_keep_rows_apart(instruct, monkeypatch):
    from peftkit.models import packing

    packed = replace(
        instruct, task={"packing": True}, training={"max_steps": 1}, evaluation={"generation": {"samples": 0}}
    )
    monkeypatch.setattr(packing, "supports_packing", lambda model: (False, "this model mixes rows"))
    run = peftkit.train(packed, quiet=True)
    notes = json.loads((run.path / "about.json").read_text())["notes"]
    assert any("this model mixes rows" in note for note in notes)
    assert Recipe.from_yaml(run.path / "recipe.yaml").task.packing is False


def test_language_models_resume_to_the_same_bytes(instruct, monkeypatch):
    from peftkit.errors import Interrupted
    from peftkit.training.interruptions import StopRequest

    recipe = replace(instruct, task={"packing": True}, training={"epochs": 6, "batch_size": 2, "neftune_alpha": 1.0})
    whole = peftkit.train(recipe, quiet=True)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "code", property(lambda self: 2 if (asked.append(1), len(asked) == 4)[1] else 0))
        with pytest.raises(Interrupted):
            peftkit.train(recipe, quiet=True)
    resumed = peftkit.train(recipe, resume=True, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
