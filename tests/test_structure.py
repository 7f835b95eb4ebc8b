"""The structure of the package: no cycle of imports, one direction, private names stay private, plain names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import peftkit

ROOT = Path(peftkit.__file__).parent
LAYERS = [
    {"errors", "registry"},
    {"schema", "system"},
    {"data"},
    {"models"},
    {"methods", "review"},
    {"evaluation", "distributed"},
    {"heads"},
    {"tasks"},
    {"runs", "planning"},
    {"training"},
    {"export", "quantize"},
    {"inference"},
    {"monitoring"},
    {"serving"},
    {"reporting"},
    {"run"},
    {"experiments"},
    {"cli", "__init__", "__main__"},
]
"""Folders and top-level modules, lowest first: a file imports from its own layer and those below."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
IMPORTERS = {"bitsandbytes": {"models", "quantize"}, "peft": {"methods", "export"}}
DIALECT = {"found", "held", "made", "said", "told", "carry_out"}
MODULES = {
    ".".join(("peftkit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if "_recipes" not in path.parts
}


def folder_of(module: str) -> str:
    """The top-level folder or module that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> frozenset[tuple[str, str]]:
    """(module, name) of every import statement in a file, wherever it stands; the name is empty for whole modules."""
    imports = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            imports |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imports.add((submodule, "") if submodule in MODULES else (node.module, alias.name))
    return frozenset(imports)


def graph() -> dict[str, set[str]]:
    """Module → modules of this package that it imports, lazy and typing imports included."""
    return {
        module: {target for target, _ in imports_of(module) if target in MODULES and target != module}
        for module in MODULES
    }


def strongly_connected(edges: dict[str, set[str]]) -> list[list[str]]:
    """Tarjan's components of more than one node."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            position = stack.index(node)
            component = stack[position:]
            del stack[position:]
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return components


def test_strongly_connected_components_are_seen():
    assert strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_cycle_of_imports_lazy_and_typing_imports_included():
    assert strongly_connected(graph()) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_layer_and_those_below(module):
    folder = folder_of(module)
    assert folder in LEVEL, f"{folder} has no place in LAYERS: decide where it belongs"
    upwards = {
        target
        for target, _ in imports_of(module)
        if target.split(".")[0] == "peftkit" and folder != "__init__"
        if LEVEL[folder_of(target)] > LEVEL[folder] and target != "peftkit"
    }
    assert upwards == set()


@pytest.mark.parametrize("library", sorted(IMPORTERS))
def test_only_the_named_folders_import(library):
    users = {folder_of(module) for module in MODULES for name, _ in imports_of(module) if name.split(".")[0] == library}
    assert users <= IMPORTERS[library]


def test_no_module_imports_private_names_of_another():
    private = {
        (module, f"{target}.{name}")
        for module in MODULES
        for target, name in imports_of(module)
        if target in MODULES and name.startswith("_") and not name.startswith("__")
    }
    for module in MODULES:
        aliases = {
            (alias.asname or alias.name): f"{node.module}.{alias.name}"
            for node in ast.walk(tree_of(module))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if f"{node.module}.{alias.name}" in MODULES
        }
        private |= {
            (module, f"{aliases[node.value.id]}.{node.attr}")
            for node in ast.walk(tree_of(module))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
            if node.attr.startswith("_") and not node.attr.startswith("__")
        }
    assert private == set()


def test_the_top_of_the_package_holds_at_most_eight_modules():
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_names_are_not_of_the_old_dialect():
    names = {
        (module, getattr(node, "lineno", 0), name)
        for module in MODULES
        for node in ast.walk(tree_of(module))
        for name in [
            node.id if isinstance(node, ast.Name)
            else node.arg if isinstance(node, ast.arg)
            else node.attr if isinstance(node, ast.Attribute)
            else getattr(node, "name", None)
        ]
        if name in DIALECT
    }  # fmt: skip
    assert names == set()
