"""Recipes by name, by file, and what is said when there is none."""

from __future__ import annotations

import pytest

from peftkit import Recipe, get_recipe
from peftkit.errors import RecipeError
from peftkit.schema import catalog

FILE = '''"""Mine."""
from peftkit import Recipe, get_recipe, recipe, replace

@recipe
def {name}():
    return replace(get_recipe("own_csv"), name="{name}", training={{"epochs": {epochs}}})
'''


def test_a_yaml_file_and_a_python_file_are_recipes_too(tmp_path):
    (tmp_path / "mine.yaml").write_text(get_recipe("own_csv").to_yaml(), encoding="utf-8")
    (tmp_path / "mine.py").write_text(FILE.format(name="mine_from_file", epochs=7), encoding="utf-8")
    assert get_recipe(str(tmp_path / "mine.yaml")) == get_recipe("own_csv")
    assert get_recipe(str(tmp_path / "mine.py")).training.epochs == 7


def test_a_built_in_recipe_is_found_by_its_path_after_its_name_was_used():
    assert get_recipe(str(catalog.built_in()["own_csv"])) == get_recipe("own_csv")


def test_a_python_file_with_none_or_two_recipes_is_refused(tmp_path):
    (tmp_path / "none.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "two.py").write_text(
        FILE.format(name="two_first", epochs=1) + FILE.format(name="two_second", epochs=1), encoding="utf-8"
    )
    with pytest.raises(RecipeError, match="expected one function under @recipe, found none"):
        get_recipe(str(tmp_path / "none.py"))
    with pytest.raises(RecipeError, match="found two_first, two_second"):
        get_recipe(str(tmp_path / "two.py"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def (:\n", r"bad\.py, line 1: "),
        ("import does_not_exist_anywhere\n", r"bad\.py: cannot be imported: ModuleNotFoundError"),
        (FILE.format(name="bad_value", epochs=-1), "training.epochs: input should be greater than 0, found -1"),
        (
            "from peftkit import recipe\n@recipe\ndef bad_none():\n    pass\n",
            "expected it to return a Recipe, found NoneType",
        ),
        (
            "from peftkit import Recipe, recipe\n@recipe\ndef bad_key():\n    return Recipe(name='x', modle={})\n",
            "unknown field 'modle': did you mean 'model'",
        ),
    ],
)
def test_a_broken_python_file_is_one_message(code, said, tmp_path):
    (tmp_path / "bad.py").write_text(code, encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        get_recipe(str(tmp_path / "bad.py"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("agnews_lor", "did you mean 'agnews_lora'"), ("none.py", "no such file"), ("none.yaml", "cannot be read")],
)
def test_a_name_that_is_no_recipe(name, said):
    with pytest.raises(RecipeError, match=said):
        get_recipe(name)


def test_recipe_names_are_those_of_their_files_and_functions():
    summaries = catalog.summaries()
    for name in catalog.built_in():
        assert get_recipe(name).name == name
        assert 10 < len(summaries[name]) < 110
    assert isinstance(get_recipe("bbc_news_lora"), Recipe)
