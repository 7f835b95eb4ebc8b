"""The registries behind a recipe's ``kind`` fields.

Adding an item means adding a file to the package named here, or an entry point of the group to an installed
distribution. Items are classes that follow the contract of their registry: ``schema.method.Method``,
``schema.task.Task``, ``schema.quantization.Quantization``. The contracts are not imported here, since they refer to
the recipe, which refers to the registries.
"""

from __future__ import annotations

from typing import Any

from peftkit.registry import Registry

METHODS: Registry[Any] = Registry("method", package="peftkit.methods", group="peftkit.methods")
TASKS: Registry[Any] = Registry("task", package="peftkit.tasks", group="peftkit.tasks")
QUANTIZATIONS: Registry[Any] = Registry(
    "quantization", package="peftkit.models.quantization", group="peftkit.quantizations"
)
