"""What the run itself exported, copied: its adapter, or the model of a method that trains the base itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from peftkit.export import hub
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder
from peftkit.export.formats.merged import Merged
from peftkit.schema.registries import EXPORTERS


@EXPORTERS.register("peft")
class Adapter(Exporter):
    """The adapter for peft, or the whole model for transformers where the method trains the base itself."""

    kind: Literal["peft"] = "peft"
    merge: bool = False
    """Merge the adapter into the base, as format ``merged`` does."""

    def unsupported_reason(self, source: ExportFolder) -> str:
        return Merged().unsupported_reason(source) if self.merge else ""

    def export(self, source: ExportFolder, folder: Path) -> None:
        if self.merge:
            Merged().export(source, folder)
        else:
            without_list = shutil.ignore_patterns(hub.FILE)
            shutil.copytree(source.path, folder, dirs_exist_ok=True, ignore=without_list)
