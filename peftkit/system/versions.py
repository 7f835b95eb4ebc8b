"""Versions of installed packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError


@functools.cache
def version(package: str) -> str:
    """The version of an installed package, whose metadata are parsed once; raises PackageNotFoundError."""
    return importlib.metadata.version(package)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of every package that is installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
