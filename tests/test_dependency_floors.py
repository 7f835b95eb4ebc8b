"""The lowest versions that pyproject.toml allows, and those that constraints.txt pins, have none of the known holes.

advisories.csv lists them: package, first version without the hole, and the CVE that tells of it. ``make audit`` asks
PyPI's own advisories about what is installed.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import audit

ROOT = Path(__file__).parents[1]


def floors():
    """Package → the lowest version allowed, of everything that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    found = {}
    for requirement in map(Requirement, named):
        lowest = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        found[canonicalize_name(requirement.name)] = max(lowest, default=Version("0"))
    return found


def pins():
    """Package → the version that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    held = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version.split(";")[0].strip()) for name, version in held}


def advisories():
    with (ROOT / "advisories.csv").open(newline="") as file:
        return [(row["package"], Version(row["fixed"]), row["advisory"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("package", "fixed", "advisory"), advisories())
def test_no_version_with_a_known_hole_is_allowed(package, fixed, advisory):
    allowed = {"pyproject.toml": floors().get(package), "constraints.txt": pins().get(package)}
    assert any(allowed.values()), f"{package} is none of ours: remove it from advisories.csv"
    for where, version in allowed.items():
        assert version is None or version >= fixed, f"{where} allows {package} {version}; {advisory} needs {fixed}"


def test_every_advisory_is_told_once_and_properly():
    told = [(package, advisory) for package, _, advisory in advisories()]
    assert len(set(told)) == len(told)
    assert all(re.fullmatch(r"CVE-\d{4}-\d{4,}|GHSA(-\w{4}){3}", advisory) for _, advisory in told)
    assert all(canonicalize_name(package) == package for package, _ in told)


def test_those_that_load_a_strangers_files_are_looked_after():
    assert {"torch", "transformers", "pyarrow", "jinja2", "pyyaml", "onnx"} <= {name for name, *_ in advisories()}


def test_every_requirement_has_a_floor():
    without = {name for name, version in floors().items() if version == Version("0")}
    assert without <= {"types-pyyaml"}


def package(name, *, holes=(), skipped=None):
    held = {"name": name, "version": "1.0", "vulns": [{"id": one, "fix_versions": fixed} for one, fixed in holes]}
    return {"name": name, "skip_reason": skipped} if skipped else held


def test_the_audit_fails_for_holes_that_a_newer_version_closes(capsys):
    assert audit.report([package("fine"), package("bad", holes=[("CVE-2026-1", ["1.1"])])]) == 1
    assert "bad 1.0: CVE-2026-1; closed in 1.1" in capsys.readouterr().out
    assert audit.report([package("fine"), package("open", holes=[("CVE-2026-2", [])])]) == 0
    assert "still open" in capsys.readouterr().out


def test_an_audit_that_cannot_ask_says_so(capsys):
    assert audit.report([package("one", skipped="not found on PyPI")]) == 0
    assert audit.main([sys.executable, "-c", "import sys; sys.exit('no network')"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all("nothing was audited" in line for line in said)
    assert "no network" in said[1]
