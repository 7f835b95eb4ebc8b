"""Imports point one way, and only the named folders know bitsandbytes and peft."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peftkit

ROOT = Path(peftkit.__file__).parent
LAYERS = [
    {"errors", "registry"},
    {"schema"},
    {"system", "data"},
    {"models"},
    {"heads", "methods", "tasks", "evaluation", "review"},
    {"distributed", "runs", "training", "planning", "export", "quantize"},
    {"inference"},
    {"reporting"},
    {"run"},
    {"experiments"},
    {"cli", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
UPWARDS = {("tasks", "evaluation.figures")}
"""A task says which figures it is scored by, and calls for them; figures.py itself imports nothing of a task."""
KNOWS = {"bitsandbytes": {"models", "quantize", "training"}, "peft": {"methods", "export"}}
MODULES = sorted(path for path in ROOT.rglob("*.py") if "_recipes" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module, whether only for type checking) of every import in the file, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node in for_types) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(f"{node.module}.{alias.name}", node in for_types) for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_its_own_layer_and_those_below(path):
    here = part_of(path)
    assert here in LEVEL, f"{here} has no place in LAYERS: decide where it belongs"
    upwards = set()
    for name, for_types in imports(path):
        parts = name.split(".")
        if parts[0] == "peftkit" and not for_types and here != "__init__":
            target = parts[1] if parts[1] in LEVEL else "__init__"
            if LEVEL[target] > LEVEL[here] and (here, ".".join(parts[1:3])) not in UPWARDS:
                upwards.add(name)
    assert upwards == set()


@pytest.mark.parametrize("library", sorted(KNOWS))
def test_only_the_named_folders_import(library):
    users = {part_of(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] == library}
    assert users <= KNOWS[library]


def test_the_data_pipeline_knows_no_tasks_module():
    assert not [
        (path.name, name)
        for path in (ROOT / "data").rglob("*.py")
        for name, for_types in imports(path)
        if name.startswith("peftkit.tasks") and not for_types
    ]
