"""peftkit: parameter-efficient finetuning from one recipe. Importing it imports neither torch nor peft.

import peftkit
run = peftkit.train(peftkit.get_recipe("bbc_news_lora"))
peftkit.load(run.path).predict(["The striker scored twice."])
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peftkit.errors import PeftkitError, UserError
from peftkit.schema.catalog import get_recipe, recipe
from peftkit.schema.recipe import Recipe, replace

if TYPE_CHECKING:
    from peftkit.cli.launch import main
    from peftkit.experiments.compare import compare
    from peftkit.experiments.tune import tune
    from peftkit.inference.evaluate import evaluate
    from peftkit.inference.trained_model import load
    from peftkit.planning.inspection import inspect
    from peftkit.run import Run, train

__version__ = "0.1.0"

# said by tqdm, beneath the libraries, in every notebook without ipywidgets; our progress needs none
warnings.filterwarnings("ignore", message="IProgress not found")

_LAZY = {
    "Run": "peftkit.run",
    "compare": "peftkit.experiments.compare",
    "evaluate": "peftkit.inference.evaluate",
    "inspect": "peftkit.planning.inspection",
    "load": "peftkit.inference.trained_model",
    "main": "peftkit.cli.launch",
    "train": "peftkit.run",
    "tune": "peftkit.experiments.tune",
}
__all__ = [
    "PeftkitError", "Recipe", "Run", "UserError", "compare", "evaluate", "get_recipe", "inspect", "load", "main",
    "recipe", "replace", "train", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
