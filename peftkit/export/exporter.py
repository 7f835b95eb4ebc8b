"""The contract of an export format: how a finished run is written, proven, described on its card, and loaded again.

A format is one file in ``peftkit.export.formats``, or a class that another package names under the entry-point group
``peftkit.exporters``. torch and peft are imported only inside the methods, so that listing the formats is fast.
"""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from peftkit.errors import MethodError, RecipeError, RunError
from peftkit.export import manifest
from peftkit.export.folder import COPIED, ExportFolder, open_export, weights_digest
from peftkit.export.manifest import Manifest
from peftkit.models.context import usable_length
from peftkit.schema.registries import EXPORTERS
from peftkit.schema.sections import ConfigSection
from peftkit.schema.types import LoadedModel
from peftkit.schema.validation import describe
from peftkit.system.files import atomic_folder

if TYPE_CHECKING:
    from peftkit.export.card import Usage
    from peftkit.export.proof import ExportProof
    from peftkit.schema.recipe import Recipe


class Exporter(ConfigSection):
    """Writes a finished run in one format.

    Fields are the format's options; the first line of the docstring is its summary in `peftkit list --formats`.
    """

    runtime: ClassVar[str] = ""
    """What runs the format, where that is not torch: `peftkit predict` can take it in torch's place (--backend)."""
    rounds: ClassVar[bool] = False
    """Whether answers are rounded further than in fp32, so that the runtime is taken only where that is allowed."""

    kind: str

    def check_installed(self) -> None:
        """Raises ModelError if packages that ``export`` needs are missing."""

    def unsupported_reason(self, source: ExportFolder) -> str:
        """Why a run cannot be written in this format, and what to do instead; empty if it can."""
        return ""

    def other_runs(self) -> tuple[str, ...]:
        """Further runs that the export is computed from, as its options name them."""
        return ()

    @abstractmethod
    def export(self, source: ExportFolder, folder: Path) -> None:
        """Writes a run's export into an empty folder, which is removed if this raises; ends with ``finish``.

        Raises:
            ExportError: the export does not reproduce the trained model.
        """

    def finish(
        self, source: ExportFolder, folder: Path, proof: ExportProof | None, *, recipe: Recipe | None = None,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Writes what every export has: peftkit.json, recipe.yaml, metrics.json, proof.json and the card.

        Args:
            proof: of this export; None if it was not proven. Where proof.json has a ``summary``, a sentence without its
                full stop, reports and the card quote it.
            recipe: by which the export is loaded, where that is not the run's.
            changes: fields of the manifest that differ from those of ``source``; ``saves`` is the format's name.

        Raises:
            ExportError: the proof failed.
        """
        from peftkit.export import card
        from peftkit.models.tokenizer import tokenizer_in

        if proof is not None:
            proof.check(f"export format '{self.kind}'")
            proof.write(folder)
        max_length = usable_length(tokenizer_in(source.path), source.manifest.max_length)
        origin = weights_digest(source.path) if self.runtime else ""
        written: dict[str, Any] = {"saves": self.kind, "max_length": max_length, "origin": origin, **changes}
        contents = replace(source.manifest, **written)
        manifest.write(folder, contents)
        for name in COPIED:
            shutil.copy2(source.path / name, folder / name)
        if recipe is not None:
            (folder / COPIED[0]).write_text(recipe.to_yaml(), encoding="utf-8")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        card.write(folder, contents, recipe or source.recipe, metrics, self.usage(contents))

    def usage(self, contents: Manifest) -> Usage:
        """How the card says to load the export, and with what."""
        from peftkit.export import card

        return card.usage(contents)

    def speed(self, contents: Manifest) -> float:
        """How fast ``load``'s model answers on this machine's CPU, next to the run itself, for what is to be served.

        0 where ``load`` does not load the format.
        """
        return 0.0

    def load(self, source: ExportFolder, tokenizer: Any) -> LoadedModel:
        """The export as a model for ``peftkit.load``; its outputs have ``logits``."""
        raise RunError(f"{source.path}: peftkit writes the format '{self.kind}', but cannot load it; load the run")


def run_export(run: str | Path, to: str | Path, *, merge: bool = False, to_format: str = "peft", **options: Any) -> str:
    """Writes a finished run to a new folder; returns a sentence about it.

    Args:
        merge: merge the adapter into the base: one plain model.
        to_format: a name from `peftkit list --formats`.
        options: of the format.

    Raises:
        RecipeError: no such format or option.
        RunError: ``run`` is not a finished run, or ``to`` is not an empty folder.
        MethodError: the run cannot be written in this format.
        ExportError: the export does not reproduce the trained model.
    """
    exporter = exporter_of(to_format, merge=merge, **options)
    source, to = open_export(run), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists and is not an empty folder; name one that does not exist yet")
    if reason := exporter.unsupported_reason(source):
        raise MethodError(reason)
    with atomic_folder(to) as folder:
        exporter.export(source, folder)
    return f"wrote {to} {describe_export(to, merge=merge, to_format=to_format)}"


def exporter_of(to_format: str, *, merge: bool = False, **options: Any) -> Exporter:
    """A format with its options; raises RecipeError if there is no such format or option."""
    options |= {"merge": True} if merge else {}
    try:
        exporter: Exporter = EXPORTERS.get(to_format).model_validate({"kind": to_format, **options})
    except ValidationError as error:
        raise RecipeError(describe(error, f"export format '{to_format}'")) from None
    return exporter


def describe_export(folder: Path, *, merge: bool, to_format: str) -> str:
    """The format of an export, and what its proof says."""
    from peftkit.export import proof

    format = f"(format {to_format}{', merged' if merge else ''})"
    values = proof.read(folder)
    if values is None:
        return f"{format}; nothing was proven (prove=false)"
    if "summary" in values:
        return f"{format}; {values['summary']}"
    return (
        f"{format}; its logits differ from the trained model's by {values['relative']:.1g} of their standard deviation "
        f"({values['tolerance']:g} allowed)"
    )
