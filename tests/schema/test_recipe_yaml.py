"""Recipes as YAML: they come back as they went, and whatever is wrong is found with line and column."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peftkit import Recipe, get_recipe, replace
from peftkit.errors import RecipeError
from peftkit.schema import catalog
from peftkit.schema.recipe_yaml import value_of

GOOD = """\
name: small
model: {source: ./model}
data:
  source: rows.csv
  labels: [no, yes, 1e-3x]
training:
  learning_rate: 1e-3
"""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Recipe.from_yaml(path)

    return write_and_read


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("name", sorted(catalog.built_in()))
def test_every_recipe_comes_back_as_it_went(name, defaults, read):
    recipe = get_recipe(name)
    assert read(recipe.to_yaml(defaults=defaults)) == recipe


@pytest.mark.parametrize(
    "label", ["no", "1e-3", "12", "true", "~", "", " a", "a: b", "# c", "ünï", "2024-01-01", "0x1f", ".inf", "<<"]
)
def test_label_names_that_look_like_something_else_come_back(label, read):
    recipe = replace(get_recipe("own_csv"), data={"labels": (label, "other")})
    assert read(recipe.to_yaml()) == recipe


def test_plain_words_are_words_and_plain_numbers_are_numbers(read):
    recipe = read(GOOD)
    assert recipe.data.labels == ("no", "yes", "1e-3x")
    assert recipe.training.learning_rate == 1e-3
    assert value_of("[1e-3, on, 010, 1:30, 2024-01-01, null, true]") == [
        1e-3,
        "on",
        "010",
        "1:30",
        "2024-01-01",
        None,
        True,
    ]


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        (GOOD.replace("learning_rate", "learning_rat"), 7, 3, "did you mean 'learning_rate'?"),
        (GOOD.replace("1e-3\n", "fast\n"), 7, 3, "training.learning_rate"),
        (GOOD.replace("labels: [no, yes, 1e-3x]", "labels: [no, 3.5]"), 5, 16, "data.labels.1"),
        (GOOD + "trainig: {}\n", 8, 1, "did you mean 'training'?"),
        (GOOD + "method: {kind: lora, rnak: 3}\n", 8, 22, "did you mean 'rank'?"),
        (GOOD + "name: again\n", 8, 1, "'name' occurs twice"),
        (GOOD + "export: {merge: [}\n", 8, 18, "not YAML"),
        (GOOD + "\ttabs: 1\n", 8, 1, "not YAML"),
        ("name: small\ndata: {source: x}\n", 1, 1, "model: field required"),
    ],
)
def test_an_error_names_file_line_column_and_field(text, line, column, said, read):
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert f"mine.yaml, line {line}, column {column}: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping"),
        ("- a\n", "expected a mapping"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("name: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than 20 deep"),
        ("a: &a 1\nb: [" + "*a, " * 101 + "]\n", "more than 100 YAML aliases"),
        ("# " + "x" * 1_000_001, "at most 1,000,000 bytes"),
    ],
)
def test_what_is_no_recipe_is_refused(text, said, read):
    with pytest.raises(RecipeError, match=said):
        read(text)


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_aliases_that_multiply_are_refused_quickly(read):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    began = time.monotonic()
    with pytest.raises(RecipeError, match="unknown field 'a0'"):
        read("\n".join(levels))
    with pytest.raises(RecipeError, match="name"):
        read("\n".join([*levels, "name: *a9"]).replace("a0:", "model:", 1))
    assert time.monotonic() - began < 5


def test_an_anchor_that_holds_itself_is_refused(read):
    with pytest.raises(RecipeError):
        read("name: &a [*a]\n")


WORDS = [*Recipe.model_fields, "kind", "source", "epochs", "lora", "classification", "rank", "1e-3", "null", "1", "-1"]
WORDS += [".inf", "~", "<<", "|", "#", "%", "@", "[", "]", "{", "}"]
WORDS += [":", ": ", ", ", "\n", "\n  ", "- ", "'", '"', "&a ", "*a ", "!!int ", "? "]


def check_read(path):
    """Reading gives a recipe, or a RecipeError that names the file; any other exception fails the test by itself."""
    try:
        outcome = Recipe.from_yaml(path)
    except RecipeError as error:
        outcome = str(error)
    assert isinstance(outcome, Recipe) or str(path) in outcome


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="!!int")
@example(text="!!bool x")
@example(text="!!timestamp x")
@example(text="? [a]\n: b")
@given(text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(WORDS), max_size=25).map("".join)))
def test_any_text_is_a_recipe_or_a_recipe_error(text, tmp_path):
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    check_read(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.sampled_from(sorted(Recipe.model_fields)),
    value=PLAIN,
    field=st.sampled_from(["kind", "source", "seed", "label", "limit"]),
)
def test_any_value_in_any_field_is_a_recipe_or_a_recipe_error(part, value, field, tmp_path):
    for wrong in (value, {field: value}):
        values = {"name": "any", "model": {"source": "m"}, "data": {"source": "d"}, part: wrong}
        path = tmp_path / "any.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        check_read(path)
