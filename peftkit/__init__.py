"""peftkit: parameter-efficient finetuning from one recipe. Importing it imports neither torch nor peft.

import peftkit
run = peftkit.train(peftkit.get_recipe("bbc_news_lora"))
peftkit.load(run.path).predict(["The striker scored twice."])
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

# the submodule and the decorator share the name `recipe`: importing both now makes the decorator win
from peftkit.recipe import Recipe, replace  # isort: skip
from peftkit.catalog import get_recipe, recipe  # isort: skip
from peftkit.errors import PeftkitError, UserError

if TYPE_CHECKING:
    from peftkit.data.inspection import inspect
    from peftkit.experiments.compare import compare
    from peftkit.experiments.tune import tune
    from peftkit.inference import load
    from peftkit.launch import main
    from peftkit.run import Run, train
    from peftkit.scoring import evaluate

__version__ = "0.1.0"

# said by tqdm, beneath the libraries, in every notebook without ipywidgets; our progress needs none
warnings.filterwarnings("ignore", message="IProgress not found")

_LAZY = {
    "Run": "peftkit.run",
    "compare": "peftkit.experiments.compare",
    "evaluate": "peftkit.scoring",
    "inspect": "peftkit.data.inspection",
    "load": "peftkit.inference",
    "main": "peftkit.launch",
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
