"""Every patch of a library or a module is listed in docs/patches.md, and nothing else is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import peftkit

ROOT = Path(peftkit.__file__).parent
PAGE = ROOT.parent / "docs" / "patches.md"
FILTERS = {"filterwarnings", "simplefilter", "setLevel", "set_verbosity", "set_verbosity_error"}
REPLACED = {"__class__", "forward", "compile", "HF_HUB_OFFLINE"}
"""Attributes that only a patch assigns to."""


def patches(tree):
    """Lines that replace a class, a forward or a library's function, set the environment, or silence a library."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in REPLACED and ast.unparse(target.value) != "self":
                yield node.lineno
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "os.environ":
                yield node.lineno
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            silences = name.rpartition(".")[2] in FILTERS
            environment = name.startswith("os.environ.") and name.endswith((".setdefault", ".update"))
            if silences or environment or name in ("atexit.register", "replaced_forward", "with_forward"):
                yield node.lineno


@pytest.mark.skipif(not PAGE.is_file(), reason="installed without docs/")
def test_the_page_lists_the_files_with_patches():
    patched = {
        path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.rglob("*.py"))
        if "_recipes" not in path.parts and any(patches(ast.parse(path.read_text(encoding="utf-8"))))
    }
    listed = set(re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8")))
    assert patched <= listed
    assert all((ROOT / name).is_file() for name in listed)
