"""What ``import peftkit`` offers, and that it is light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import peftkit

HEAVY = {"torch", "peft", "transformers", "datasets", "accelerate", "numpy", "pandas", "matplotlib", "sklearn"}


def test_the_public_names_are_exactly_these():
    assert peftkit.__all__ == [
        "PeftkitError", "Recipe", "Run", "UserError", "compare", "evaluate", "get_recipe", "inspect", "load", "main",
        "recipe", "replace", "train", "tune",
    ]  # fmt: skip


def test_every_public_name_is_there_and_documented():
    for name in peftkit.__all__:
        assert getattr(peftkit, name).__doc__, name
        assert name in dir(peftkit)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = peftkit.trian


def test_recipe_is_the_decorator_although_a_module_has_that_name():
    import peftkit.schema.recipe

    assert callable(peftkit.recipe)
    assert peftkit.recipe.__module__ == "peftkit.schema.catalog"


LIGHT = """
import json, sys
sys.argv = ["peftkit", *json.loads(sys.argv[1])]
from peftkit.cli.app import main
try:
    main()
except SystemExit as stop:
    print(json.dumps([stop.code or 0, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "--json"],
        ["show", "agnews_lora", "method.kind=frozen"],
        ["schema"],
        ["--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_commands_that_only_read_recipes_import_nothing_slow(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(arguments)], capture_output=True, text=True, timeout=60, check=True
    )
    code, loaded = json.loads(done.stderr)
    assert code == 0
    assert done.stdout.strip()
    assert set(loaded) & HEAVY == set()
    assert "pydantic" in loaded
