"""The recipes of methods: each differs from its base as it says, is trained, and predicts again what it predicted."""

from __future__ import annotations

import json

import pytest

import peftkit
from peftkit import get_recipe
from peftkit.cli import launch
from peftkit.schema import catalog, overrides
from tests import tiny
from tests.methods.every_method import TEXTS

BASES = {
    "agnews_lora_variants": "agnews_lora",
    "agnews_methods": "agnews_lora",
    "instruct_methods": "instruct_alpaca_lora",
}
FAMILIES = {name: path.stem for name, path in catalog.built_in().items() if path.stem in BASES}
CLASSIFIERS = [name for name in FAMILIES if name.startswith("agnews")]
QUICK = ("agnews_dora", "agnews_bitfit", "agnews_prefix_tuning", "agnews_loftq")
"""A variant of LoRA, weights of the base itself, a prompt, a start of its own; the methods of the others are trained in
test_every_method.py."""
WRITERS = [name for name in FAMILIES if name.startswith("instruct")]
NARROW = {
    "agnews_miss": ["method.rank=4"],
    "agnews_eva": ["method.rank=2"],
    "agnews_prefix_tuning": ["method.virtual_tokens=4"],
}
"""What recipes for models of usual width need on one of width 32."""
SMALL = [
    "training.max_steps=2", "training.batch_size=8", "training.threads=1", "training.epochs=1", "model.dtype=float32",
    "export.prove=false", "tracking=[]", "evaluation.baselines=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A RoBERTa, a Llama, and rows for both."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny.tiny_roberta(folder / "roberta")
    tiny.tiny_llama(folder / "llama")
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 6)]
    rows = "".join(f"{text},{number % 4}\n" for number, text in enumerate(texts))
    (folder / "rows.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    asked = [{"instruction": text, "input": "", "output": f"yes {text}"} for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    return folder


def trained(name, base, rows, folder, tmp_path, *more):
    changes = [f"model.source={folder / base}", f"data.source={folder / rows}", f"output_dir={tmp_path}", *SMALL]
    return peftkit.train(overrides.apply(get_recipe(name), [*changes, *NARROW.get(name, ()), *more]), quiet=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_changes_the_method_and_what_belongs_to_it(name):
    one, base = get_recipe(name).model_dump(), get_recipe(BASES[FAMILIES[name]]).model_dump()
    assert one["name"] == name
    assert one["method"] != base["method"]
    allowed = {"name", "method", "training"} | ({"quantization"} if "loftq" in name else set())
    assert {key for key in one if one[key] != base[key]} <= allowed
    assert {key for key, value in one["training"].items() if value != base["training"][key]} <= {"learning_rate"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CLASSIFIERS]
)
def test_a_classifier_s_recipe_runs_and_predicts_again_what_it_predicted(name, folder, tmp_path):
    run = trained(name, "roberta", "rows.csv", folder, tmp_path, "data.max_length=32")
    lines = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    found = peftkit.load(run.path).predict([line["text"] for line in lines])
    assert [one.label for one in found] == [line["predicted"] for line in lines]


@pytest.mark.parametrize("name", WRITERS)
def test_a_language_model_s_recipe_runs_and_writes(name, folder, tmp_path):
    run = trained(
        name, "llama", "rows.jsonl", folder, tmp_path, "data.max_length=64", "evaluation.generation.samples=0"
    )
    assert run.metrics["training"]["steps"] == 2
    assert run.metrics["test"]["loss"] > 0
    assert list(run.adapter.glob("*.safetensors"))


def test_every_kind_of_method_has_a_recipe():
    from peftkit.schema.registries import METHODS

    named = {get_recipe(name).method.kind for name in catalog.built_in()}
    assert set(METHODS.names()) - named == {"peft"}  # any other of peft's, by name


def test_a_file_of_several_recipes_runs_the_one_that_is_named(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(launch, "train", lambda recipe, *_: seen.append(recipe))
    functions = [_function("agnews_dora"), _function("agnews_bitfit")]
    launch.main(functions, ["agnews_bitfit", "training.epochs=7"])
    assert (seen[0].name, seen[0].training.epochs) == ("agnews_bitfit", 7)
    with pytest.raises(SystemExit) as ended:
        launch.main(functions, ["agnews_dorra"])
    assert ended.value.code == 2
    assert "did you mean 'agnews_dora'" in capsys.readouterr().err
    assert len(seen) == 1


def _function(name):
    get_recipe(name)
    return catalog.RECIPES.get(name)
