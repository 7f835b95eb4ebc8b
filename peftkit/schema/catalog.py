"""Recipes by name: those of this package, and functions under ``@recipe`` in any file.

@recipe
def my_recipe() -> Recipe: ...
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from peftkit.errors import RecipeError, did_you_mean
from peftkit.registry import Registry
from peftkit.schema.recipe import Recipe
from peftkit.schema.validation import describe

RecipeFunction = Callable[[], Recipe]
RECIPES: Registry[RecipeFunction] = Registry("recipe", group="peftkit.recipes")


def recipe(function: RecipeFunction) -> RecipeFunction:
    """Registers a function that returns a Recipe under the function's name."""
    return RECIPES.register(function.__name__)(function)


def recipes_folder() -> Path:
    """Folder of the built-in recipes: ``recipes/`` of a checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name → file of the built-in recipes, without importing them; a file may hold several."""
    files = [path for path in sorted(recipes_folder().glob("*.py")) if not path.stem.startswith("_")]
    return {function.name: path for path in files for function in _marked(_parsed(path))}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, of a ``.yaml`` file, or of a ``.py`` file with one ``@recipe`` function.

    Raises:
        RecipeError: there is no such recipe (the nearest name is given), or it is not valid.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return Recipe.from_yaml(path)
    if path.suffix == ".py":
        return _from_file(path)
    files = built_in()
    if name not in RECIPES and name in files:
        _import(files[name])
    if name not in RECIPES:
        known = sorted(set(files) | set(RECIPES))
        raise RecipeError(f"unknown recipe '{name}': {did_you_mean(name, known)} (`peftkit list` shows all)")
    return build(RECIPES.get(name))


def build(function: RecipeFunction) -> Recipe:
    """Calls a recipe function; raises RecipeError unless it returns a valid recipe."""
    try:
        built = function()
    except ValidationError as error:
        raise RecipeError(describe(error, f"recipe '{function.__name__}'")) from None
    if not isinstance(built, Recipe):
        raise RecipeError(f"recipe '{function.__name__}': expected it to return a Recipe, found {type(built).__name__}")
    return built


def summaries() -> dict[str, str]:
    """Name → one line, of built-in recipes (which are not imported) and of those that others added.

    The line is the first of the file's docstring, or of the function's where the file holds several recipes.
    """
    lines = {}
    for path in dict.fromkeys(built_in().values()):
        module = _parsed(path)
        functions = _marked(module)
        for function in functions:
            lines[function.name] = _first_line(ast.get_docstring(module if len(functions) == 1 else function))
    return lines | {name: _first_line(RECIPES.get(name).__doc__) for name in RECIPES if name not in lines}


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _marked(module: ast.Module) -> list[ast.FunctionDef]:
    """The functions under ``@recipe``."""
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    return [one for one in functions if any(isinstance(d, ast.Name) and d.id == "recipe" for d in one.decorator_list)]


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _from_file(path: Path) -> Recipe:
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    path = path.resolve()
    _import(path)
    names = [name for name in RECIPES if RECIPES.get(name).__code__.co_filename == str(path)]
    if len(names) != 1:
        raise RecipeError(f"{path}: expected one function under @recipe, found {', '.join(names) or 'none'}")
    return build(RECIPES.get(names[0]))


def _import(path: Path) -> None:
    """Imports a recipe file under a name of its own, so that it cannot shadow another module."""
    name = f"peftkit_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RecipeError:
        raise
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise RecipeError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
