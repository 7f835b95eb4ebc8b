"""The registries behind a recipe: its ``kind`` fields, heads, baselines, data sources and file readers.

Adding an item means adding a file to the package named here, or an entry point of the group to an installed
distribution. Items are classes that follow the contract of their registry: ``schema.method.Method``,
``schema.task.Task``, ``schema.head.Head``, ``schema.baseline.Baseline``, ``schema.quantization.Quantization``,
``data.source.Source``, ``data.reader.Reader``. The contracts are not imported here, since they refer to the recipe,
which refers to the registries.
"""

from __future__ import annotations

from typing import Any

from peftkit.registry import Registry

METHODS: Registry[Any] = Registry("method", package="peftkit.methods", group="peftkit.methods")
TASKS: Registry[Any] = Registry("task", package="peftkit.tasks", group="peftkit.tasks")
HEADS: Registry[Any] = Registry("head", package="peftkit.heads", group="peftkit.heads")
BASELINES: Registry[Any] = Registry("baseline", package="peftkit.evaluation.baselines", group="peftkit.baselines")
QUANTIZATIONS: Registry[Any] = Registry(
    "quantization", package="peftkit.models.quantization", group="peftkit.quantizations"
)
SOURCES: Registry[Any] = Registry("data source", package="peftkit.data.sources", group="peftkit.sources")
READERS: Registry[Any] = Registry("file reader", package="peftkit.data.readers", group="peftkit.readers")
EXPORTERS: Registry[Any] = Registry("export format", package="peftkit.export.formats", group="peftkit.exporters")


def runtime_formats() -> list[str]:
    """Names of the export formats that a runtime other than torch runs."""
    return [name for name in EXPORTERS if EXPORTERS.get(name).runtime]
