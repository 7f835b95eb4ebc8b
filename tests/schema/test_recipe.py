"""The schema: what it refuses, what it says, and that a recipe cannot be changed by accident."""

from __future__ import annotations

import json

import jsonschema
import pytest
from pydantic import ValidationError

from peftkit import Recipe, get_recipe, replace
from peftkit.errors import RecipeError
from peftkit.schema import catalog
from peftkit.schema.recipe import merge

SMALL = {"name": "small", "model": {"source": "./model"}, "data": {"source": "rows.csv"}}


def small(**parts):
    return Recipe.parse({**SMALL, **parts})


@pytest.mark.parametrize(
    ("parts", "wrong", "near"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"source": "x", "pooing": "mean"}}, "pooing", "pooling"),
        ({"data": {"source": "x", "maxlength": 4}}, "maxlength", "max_length"),
        ({"data": {"source": "x", "cleaning": {"leakge": "drop"}}}, "leakge", "leakage"),
        ({"data": {"source": "x", "augmentation": {"swaps": 0.1}}}, "swaps", "swap"),
        ({"training": {"epoch": 1}}, "epoch", "epochs"),
        ({"training": {"early_stopping": {"patiense": 1}}}, "patiense", "patience"),
        ({"evaluation": {"metric": ["f1"]}}, "metric", "metrics"),
        ({"evaluation": {"generation": {"topp": 0.5}}}, "topp", "top_p"),
        ({"export": {"prov": False}}, "prov", "prove"),
        ({"method": {"kind": "lora", "rnak": 4}}, "rnak", "rank"),
        ({"method": {"kind": "lroa"}}, "lroa", "lora"),
        ({"task": {"kind": "clasification"}}, "clasification", "classification"),
        ({"task": {"kind": "classification", "label_smoothin": 0.1}}, "label_smoothin", "label_smoothing"),
    ],
)
def test_unknown_key_names_the_nearest_at_every_level(parts, wrong, near):
    with pytest.raises(RecipeError, match=rf"'{wrong}': did you mean '{near}'\?") as caught:
        small(**parts)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"training": {"epochs": -1}}, "training.epochs: input should be greater than 0, found -1"),
        ({"training": {"epochs": float("inf")}}, "use max_steps or max_time"),
        ({"training": {"batch_size": "many"}}, "training.batch_size: input should be a valid integer"),
        ({"training": {"batching": "sorted"}}, "training.batching: input should be 'length' or 'random'"),
        ({"name": "../up"}, "name: string should match pattern"),
        ({"method": {"rank": 8}}, "method: expected a mapping with 'kind'"),
        ({"data": {"source": ["a", "b"], "weights": [1.0]}}, "data.weights has 1 values for 2 sources"),
        ({"method": {"kind": "lora", "rank": 0}}, "method.rank"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(parts, said):
    with pytest.raises(RecipeError) as caught:
        small(**parts)
    assert said in str(caught.value)


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(RecipeError, match="2 fields are wrong") as caught:
        small(training={"epochs": 0, "seed": "x"})
    assert "training.epochs" in str(caught.value)
    assert "training.seed" in str(caught.value)


def test_a_recipe_and_its_parts_are_frozen():
    recipe = small()
    for part, field in ((recipe, "name"), (recipe.training, "epochs"), (recipe.method, "rank")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


def test_replace_changes_the_named_fields_only_and_leaves_the_original():
    recipe = small(training={"epochs": 5, "seed": 3})
    other = replace(recipe, name="other", training={"epochs": 1})
    assert (other.name, other.training.epochs, other.training.seed) == ("other", 1, 3)
    assert recipe.training.epochs == 5


def test_replacing_a_kind_starts_from_its_own_defaults():
    other = replace(small(method={"kind": "lora", "rank": 4}), method={"kind": "frozen"})
    assert other.method.kind == "frozen"
    assert "rank" not in other.method.model_dump()


def test_replace_refuses_a_part_that_is_not_there():
    with pytest.raises(RecipeError, match="no part 'trainig': did you mean 'training'"):
        replace(small(), trainig={"epochs": 1})


def test_a_new_source_drops_the_revision_of_the_old_one():
    pinned = small(model={"source": "some/model", "revision": "abc"}, data={"source": "some/data", "subset": "en"})
    moved = replace(pinned, model={"source": "./local"}, data={"source": "rows.csv"})
    assert (moved.model.revision, moved.data.subset) == (None, None)
    kept = replace(pinned, model={"source": "some/model", "dropout": 0.0}, data={"max_length": 64})
    assert (kept.model.revision, kept.data.subset) == ("abc", "en")


def test_merge_goes_down_into_mappings():
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}) == {"a": {"b": 9, "c": 2}, "d": 3}


def test_the_learning_rate_is_the_methods_own_unless_given():
    frozen = small(method={"kind": "frozen"})
    assert frozen.learning_rate == frozen.method.default_learning_rate
    assert small(training={"learning_rate": 0.5}).learning_rate == 0.5


def test_the_json_schema_is_valid_and_every_recipe_fits_it():
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in catalog.built_in():
        values = json.loads(get_recipe(name).model_dump_json())
        validator.validate(values)
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**values, "method": {"kind": "lora", "rnak": 4}})


def test_every_field_says_in_the_schema_what_it_means():
    schema = Recipe.model_json_schema()
    silent = [
        f"{part}.{name}"
        for part, definition in schema["$defs"].items()
        for name, field in definition.get("properties", {}).items()
        if name != "kind" and not field.get("description")
    ]
    assert silent == []
