"""``peftkit.json``: what ``peftkit.load`` needs to know of an exported folder beyond what peft and transformers write.

The task's labels, how tokens are pooled, which base, and its fingerprint. Reading it runs no code of the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from peftkit.errors import ModelError, RunError
from peftkit.models.context import usable_length
from peftkit.models.json_files import read_json
from peftkit.models.quantization.checkpoint import quantized_with
from peftkit.models.sources import resolve
from peftkit.models.stages import CONTENTS as FILE
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import EXPORTERS, HEADS
from peftkit.schema.types import LoadedModel, Stage, TaskInfo
from peftkit.schema.validation import describe
from peftkit.system.files import write_json

FORMAT = 1
SAVES = ("adapter", "model")


def _check_saves(name: str) -> str:
    if name not in SAVES:
        EXPORTERS.get(name)  # raises for an unknown format
    return name


def _check_head(info: TaskInfo) -> TaskInfo:
    HEADS.get(info.problem_type)  # raises for an unknown head
    return info


@dataclass(frozen=True)
class Manifest:
    """The contents of peftkit.json; unknown or missing fields are refused when it is read."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    recipe: str
    method: str
    saves: Annotated[str, AfterValidator(_check_saves)]
    """adapter, model, or the name of another export format."""
    task: str
    info: Annotated[TaskInfo, AfterValidator(_check_head)]
    pooling: Literal["own", "mean", "cls", "last"]
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
    max_length: Annotated[int, Field(gt=0, lt=10**8)]
    tuned: dict[str, float] = field(default_factory=dict)
    """Options of the head that were chosen on validation rows, see ``Head.tune``."""
    format: int = FORMAT
    stages: tuple[Stage, ...] = ()
    """The earlier trainings that it stands on, the first one first."""
    choices: tuple[str, ...] = ()
    """What the run chose of its method on the training rows, in words."""
    origin: str = ""
    """Of an export for another runtime: the SHA-256 of the weights that it was written from."""

    @property
    def head(self) -> Head:
        """The head, with its own defaults in place of the task's options."""
        return head_of(self.info, tuned=self.tuned)


def build_manifest(
    loaded: LoadedModel, recipe: Recipe, info: TaskInfo, dtype: str, tuned: Mapping[str, float] | None = None
) -> Manifest:
    from peftkit.models.blocks import unwrap

    source = resolve(recipe.model)
    model = unwrap(loaded.model)
    quantization = recipe.quantization.model_dump(mode="json") if recipe.quantization else None
    if quantization is None and (kind := quantized_with(model.config)):
        quantization = {"kind": kind}
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
        quantization=quantization,
        max_length=usable_length(loaded.tokenizer, recipe.data.max_length),
        tuned=dict(tuned or {}),
        stages=loaded.stages,
    )


def write(folder: Path, manifest: Manifest) -> None:
    write_json(folder / FILE, asdict(manifest))


def read(folder: Path) -> Manifest:
    """Reads peftkit.json; raises RunError if it is missing, unreadable or of a newer format."""
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"{folder}: expected an export of peftkit, found no {FILE} in it")
    try:
        values = read_json(file)
        format = values.get("format") if isinstance(values, dict) else None
        if isinstance(format, int) and format > FORMAT:
            raise RunError(f"{file}: written by a newer peftkit (format {format}); upgrade to read it")
        return TypeAdapter(Manifest).validate_python(values)
    except ModelError as error:
        raise RunError(str(error)) from None
    except ValidationError as error:
        raise RunError(describe(error, f"{file}: not as peftkit writes it")) from None
