"""The wheel: what is in it, and that the command line answers from it without the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from peftkit.schema import catalog

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_CHECKOUT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["peftkit", *sys.argv[2:]]
import peftkit
assert peftkit.__file__.startswith(sys.path[0]), peftkit.__file__
from peftkit.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, and the folder into which it is unpacked (as an installer would)."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = folder / done.stdout.split()[-1]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return path, folder / "site"


def test_the_wheel_holds_the_package_its_recipes_and_templates_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    inside = {name.partition("/")[2] for name in names if name.startswith("peftkit/")}
    source = {path.relative_to(ROOT / "peftkit").as_posix() for path in (ROOT / "peftkit").rglob("*.py")}
    assert source <= inside
    assert {f"_recipes/{path.name}" for path in catalog.built_in().values()} <= inside
    assert any(name.startswith("reporting/templates/") for name in inside)
    assert {name.split("/")[0] for name in names} == {
        "peftkit",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".csv"))]


def test_list_and_show_answer_from_the_wheel(wheel, tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_CHECKOUT, str(wheel[1]), *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    rows = {row["name"]: row["file"] for row in json.loads(call("list", "--json"))}
    assert set(catalog.built_in()) <= set(rows)
    assert rows["agnews_frozen"] == str(wheel[1] / "peftkit" / "_recipes" / "agnews_frozen.py")
    assert "kind: frozen" in call("show", "agnews_frozen", "--no-defaults")
