"""``peftkit.json``: what an exported folder says of itself beyond what peft and transformers write.

It is what ``peftkit.load`` needs on another machine: the task's labels, how tokens are pooled, which base, and its
fingerprint. Reading it runs nothing.
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
from peftkit.schema.registries import HEADS
from peftkit.schema.types import LoadedModel, TaskInfo

FILE = "peftkit.json"
FORMAT = 1
SAVES, POOLINGS = ("adapter", "model", "onnx"), ("own", "mean", "cls")


@dataclass(frozen=True)
class Manifest:
    """The contents of peftkit.json."""

    recipe: str
    """The recipe's name."""
    method: str
    saves: str
    """adapter or model."""
    task: str
    info: TaskInfo
    pooling: str
    heads: tuple[str, ...]
    auto_class: str
    """transformers' class that loads the base."""
    source: str
    """The base as the recipe names it; ``package:NAME`` means the same on every machine."""
    base: str
    """The base as peft names it: hub id, or a folder on the machine that trained."""
    revision: str | None
    fingerprint: str
    """Of the base; see ``peftkit.models.sources.fingerprint``."""
    dtype: str
    """Of the frozen weights while training."""
    quantization: dict[str, Any] | None
    """How the recipe held the base's weights, or {kind: gptq} of a checkpoint that holds them so itself."""
    max_length: int
    format: int = FORMAT

    @property
    def head(self) -> Head:
        """The head, with its own defaults in place of the task's options."""
        return head_of(self.info)


def build_manifest(loaded: LoadedModel, recipe: Recipe, info: TaskInfo, dtype: str) -> Manifest:
    """The description of a trained model."""
    from peftkit.models.classifier import unwrap

    source = resolve(recipe.model)
    inner = unwrap(loaded.model)
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
        base=str(inner.name_or_path),
        revision=_commit(source.revision, inner) if source.kind == "hub" else None,
        fingerprint=loaded.fingerprint,
        dtype=dtype,
        quantization=_quantization(recipe, inner),
        max_length=recipe.data.max_length,
    )


def _quantization(recipe: Recipe, model: Any) -> dict[str, Any] | None:
    if recipe.quantization is not None:
        return dict(recipe.quantization.model_dump(mode="json"))
    kind = quantized_with(model.config)
    return {"kind": kind} if kind else None


def write(folder: Path, description: Manifest) -> None:
    """Writes peftkit.json."""
    (folder / FILE).write_text(json.dumps(asdict(description), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Reads peftkit.json; raises RunError when it is missing, unreadable or of a newer format."""
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
        about = Manifest(**{**values, "info": TaskInfo(**info), "heads": tuple(values["heads"])})
        _check(about)
        return about
    except ModelError as error:
        raise RunError(str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{file}: not as peftkit writes it ({type(error).__name__}: {str(error)[:200]})") from None


def _check(about: Manifest) -> None:
    """Raises TypeError or ValueError where a value is of another kind than we write."""
    texts = [getattr(about, name) for name in ("recipe", "method", "task", "auto_class", "source", "base", "dtype")]
    texts += [about.fingerprint, *about.heads, *about.info.labels, about.revision or ""]
    odd = [repr(text)[:60] for text in texts if not isinstance(text, str)]
    if odd:
        raise TypeError(f"expected a text, found {odd[0]}")
    chosen = {"saves": SAVES, "pooling": POOLINGS}
    for name, known in chosen.items():
        if getattr(about, name) not in known:
            raise ValueError(f"{name} is {getattr(about, name)!r:.60}; known are {', '.join(known)}")
    try:
        HEADS.get(about.info.problem_type)
    except RecipeError as error:
        raise ValueError(f"problem_type: {error!s:.120}") from None
    if not isinstance(about.max_length, int) or not 0 < about.max_length < 10**8:
        raise ValueError(f"max_length is {about.max_length!r:.60}")


def _commit(revision: str | None, model: Any) -> str | None:
    """The commit that was really read, where the cache tells it; a branch may have moved on by tomorrow."""
    return getattr(model.config, "_commit_hash", None) or revision
