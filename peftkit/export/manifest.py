"""``peftkit.json``: what ``peftkit.load`` needs to know of an exported folder beyond what peft and transformers write.

The task's labels, how tokens are pooled, which base, and its fingerprint. Reading it runs no code of the export.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ModelError, RecipeError, RunError
from peftkit.models.quantization.checkpoint import quantized_with
from peftkit.models.sources import read_json, resolve
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import EXPORTERS, HEADS
from peftkit.schema.types import LoadedModel, TaskInfo

FILE = "peftkit.json"
FORMAT = 1
SAVES, POOLINGS = ("adapter", "model"), ("own", "mean", "cls")


@dataclass(frozen=True)
class Manifest:
    """The contents of peftkit.json."""

    recipe: str
    """The recipe's name."""
    method: str
    saves: str
    """adapter, model, or the format's name of another exporter."""
    task: str
    info: TaskInfo
    pooling: str
    heads: tuple[str, ...]
    auto_class: str
    """The class of transformers that loads the base."""
    source: str
    """The base as the recipe names it; ``package:NAME`` means the same on every machine."""
    base: str
    """The base as peft names it: a hub id, or a folder on the machine that trained."""
    revision: str | None
    fingerprint: str
    """Of the base; see ``peftkit.models.sources.fingerprint``."""
    dtype: str
    """Of the frozen weights in training."""
    quantization: dict[str, Any] | None
    """The recipe's quantization of the base, or {kind: gptq} for a base whose checkpoint is quantized."""
    max_length: int
    format: int = FORMAT

    @property
    def head(self) -> Head:
        """The head, with its own defaults in place of the task's options."""
        return head_of(self.info)


def build_manifest(loaded: LoadedModel, recipe: Recipe, info: TaskInfo, dtype: str) -> Manifest:
    """The manifest of a trained model."""
    from peftkit.models.blocks import unwrap

    source = resolve(recipe.model)
    model = unwrap(loaded.model)
    return Manifest(
        recipe=recipe.name,
        method=recipe.method.kind,
        saves=recipe.method.saves,
        task=recipe.task.kind,
        info=info,
        pooling=loaded.pooling,
        heads=tuple(loaded.head_names),
        auto_class=loaded.auto_class,
        source=recipe.model.source,
        base=str(model.name_or_path),
        # the commit that was read, if the cache knows it: a branch may have moved by tomorrow
        revision=getattr(model.config, "_commit_hash", None) or source.revision if source.kind == "hub" else None,
        fingerprint=loaded.fingerprint,
        dtype=dtype,
        quantization=_quantization(recipe, model),
        max_length=recipe.data.max_length,
    )


def write(folder: Path, manifest: Manifest) -> None:
    """Writes peftkit.json."""
    (folder / FILE).write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Reads peftkit.json; raises RunError if it is missing, unreadable or of a newer format."""
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"{folder}: expected an export of peftkit, found no {FILE} in it")
    try:
        values = read_json(file)
        if values["format"] > FORMAT:
            raise RunError(f"{file}: written by a newer peftkit (format {values['format']}); upgrade to read it")
        info = values["info"] | {"labels": tuple(values["info"]["labels"])}
        if info.get("class_weights") is not None:
            info["class_weights"] = tuple(info["class_weights"])
        manifest = Manifest(**{**values, "info": TaskInfo(**info), "heads": tuple(values["heads"])})
        _check(manifest)
        return manifest
    except ModelError as error:
        raise RunError(str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{file}: not as peftkit writes it ({type(error).__name__}: {str(error)[:200]})") from None


def _check(manifest: Manifest) -> None:
    """Raises TypeError or ValueError for a value that peftkit does not write."""
    names = ("recipe", "method", "task", "auto_class", "source", "base", "dtype", "fingerprint")
    texts = [*(getattr(manifest, name) for name in names), *manifest.heads, *manifest.info.labels]
    for text in [*texts, manifest.revision or ""]:
        if not isinstance(text, str):
            raise TypeError(f"expected a text, found {text!r:.60}")
    for name, known in {"saves": (*SAVES, *EXPORTERS), "pooling": POOLINGS}.items():
        if getattr(manifest, name) not in known:
            raise ValueError(f"{name} is {getattr(manifest, name)!r:.60}; known are {', '.join(known)}")
    try:
        HEADS.get(manifest.info.problem_type)
    except RecipeError as error:
        raise ValueError(f"problem_type: {error!s:.120}") from None
    if not isinstance(manifest.max_length, int) or not 0 < manifest.max_length < 10**8:
        raise ValueError(f"max_length is {manifest.max_length!r:.60}")


def _quantization(recipe: Recipe, model: Any) -> dict[str, Any] | None:
    if recipe.quantization is not None:
        return dict(recipe.quantization.model_dump(mode="json"))
    kind = quantized_with(model.config)
    return {"kind": kind} if kind else None
