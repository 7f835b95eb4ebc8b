"""compare and tune on every kind of task: the task's own metric decides, with a test of significance."""

from __future__ import annotations

import json

import pytest

import peftkit
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import TASKS
from tests import tiny
from tests.conftest import topic_rows

WORDS = tiny.WORDS
QUICK = ("masked_lm",)
"""Tasks of which nothing else here is trained in a comparison or a search."""


def rows_of(kind):
    """Rows for a task, and the fields that name their columns."""
    texts = [" ".join(text.split()[-9:]) for text, _ in topic_rows(36)]
    match kind:
        case "classification":
            return [{"text": text, "label": topic} for text, topic in topic_rows(36)], {}
        case "token_classification":
            spans = [{"start": 0, "end": text.index(" "), "label": "first"} for text in texts]
            return [{"text": text, "spans": [one]} for text, one in zip(texts, spans)], {"label": "spans"}
        case "question_answering":
            rows = [{"text": "who?", "context": f"{text} Ann", "answers": "Ann"} for text in texts]
            return rows, {"text_pair": "context", "label": "answers"}
        case "similarity":
            return [{"text": text, "other": text[: len(text) // 3]} for text in texts], {"text_pair": "other"}
        case "instruction":
            return [{"instruction": text, "output": "yes please"} for text in texts], {}
        case "preference":
            return [{"prompt": text, "chosen": "yes please", "rejected": "no"} for text in texts], {}
        case "seq2seq":
            return [{"text": text, "target": text.split()[0]} for text in texts], {"label": "target"}
    return [{"text": text} for text in texts], {}


BASES = {
    "style": tiny.tiny_llama,
    "instruction": tiny.tiny_llama,
    "preference": tiny.tiny_llama,
    "seq2seq": tiny.tiny_t5,
}


@pytest.fixture
def recipe(request, tmp_path):
    rows, columns = rows_of(request.param)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = BASES.get(request.param, tiny.tiny_bert)(tmp_path / "base")
    cleaning = {"near_duplicates": "off", "duplicates": "off", "leakage": "off"}
    return Recipe.parse(
        {
            "name": request.param, "model": {"source": str(base), "dtype": "float32"},
            "method": {"kind": "lora", "rank": 2}, "task": {"kind": request.param},
            "data": {"source": str(tmp_path / "rows.jsonl"), "max_length": 120, "cleaning": cleaning, **columns},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "threads": 1},
            "evaluation": {"baselines": [], "generation": {"samples": 0}}, "export": {"prove": False},
            "tracking": [], "output_dir": str(tmp_path / "runs"),
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    "recipe", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in TASKS.names()],
    indirect=True, ids=str,
)  # fmt: skip
def test_learning_rates_are_compared_and_searched(recipe, tmp_path):
    rates = {"training.learning_rate": [1e-3, 1e-1]}
    compared = peftkit.compare(recipe, vary=rates, isolated=False, quiet=True, out=tmp_path / "compared")
    first, second = compared.table["variants"]
    assert [first["status"], second["status"]] == ["done", "done"]
    assert all(one["low"] <= one["value"] <= one["high"] for one in (first, second))
    other = first if compared.table["best"] == second["variant"] else second
    assert 0 <= other["p_value"] <= 1
    study = peftkit.tune(recipe, rates, sampler="grid", isolated=False, quiet=True, out=tmp_path / "tuned")
    values = [trial["value"] for trial in study.table["trials"]]
    pick = max if study.table["greater_is_better"] else min
    assert len(values) == 2
    assert study.table["best"]["value"] == pick(values)
    assert study.table["metric"] in study.run.metrics["test"]
