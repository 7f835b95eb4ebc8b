"""What a run can stand on besides a base model: another run's result, or an adapter that peft wrote.

    model.source=RUN                               the model that the run trained
    model.adapter=RUN  model.adapter_use=merge     the same, or a peft adapter, merged into model.source
    model.adapter=RUN  model.adapter_use=continue  the adapter is trained further, on its own base

Merging is done once, by the export format ``merged``, into the cache. That format is looked up in its registry: exports
are built on models, and not the other way around.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ModelError, RunError
from peftkit.models.json_files import read_json
from peftkit.schema.recipe import ModelConfig
from peftkit.schema.registries import EXPORTERS
from peftkit.schema.types import Stage, TaskInfo
from peftkit.system.files import file_digest

RUN = "run:"
CONTENTS = "peftkit.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPORTS = ("adapter", "model")
"""Folders of a run that hold what it trained."""
FORMAT = 1
"""Of merged folders in the cache; raised when the same adapter would be merged into other weights."""


@dataclass(frozen=True)
class Trained:
    """What an earlier training left in a folder."""

    path: Path
    contents: dict[str, Any]
    """Of peftkit.json; empty for an adapter that peft wrote."""

    @property
    def is_adapter(self) -> bool:
        """Whether it needs its base; else it is a whole model."""
        return self.contents.get("saves", EXPORTS[0]) == EXPORTS[0]

    @property
    def run(self) -> str:
        """Name of the run's folder, or of the folder itself."""
        path = self.path.resolve()
        return path.parent.name if path.name in EXPORTS else path.name

    @property
    def digest(self) -> str:
        """SHA-256 over the adapter's two files, or over the files of a whole model."""
        total = hashlib.sha256()
        for path in sorted([*self.path.glob("*.safetensors"), self.path / ADAPTER_CONFIG]):
            if path.is_file():
                total.update(f"{path.name} {file_digest(path)}\n".encode())
        return total.hexdigest()

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of its head's modules; the pooler belongs to the backbone, which it was trained with."""
        return tuple(name for name in self.contents.get("heads", ()) if name != "pooler")

    def has_head_for(self, info: TaskInfo, auto_class: str) -> bool:
        """Whether its head answers the same question: the same labels by the same class of transformers."""
        labels = self.contents.get("info", {}).get("labels", ())
        return tuple(labels) == info.labels and self.contents.get("auto_class") == auto_class

    def stage(self, use: str, checked: str) -> Stage:
        """Its entry in the provenance of what is trained on it."""
        contents = self.contents
        base = contents.get("base") or read_json(self.path / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
        return Stage(
            run=self.run, path=str(self.path.resolve()), use=use, method=contents.get("method", "peft"),
            task=contents.get("task"), digest=self.digest, base=str(base),
            base_fingerprint=contents.get("fingerprint"), checked=checked,
        )  # fmt: skip

    @property
    def earlier(self) -> tuple[Stage, ...]:
        """What it stood on itself."""
        return tuple(Stage(**values) for values in self.contents.get("stages", ()))


def trained_in(path: Path) -> Trained | None:
    """What peftkit exported to a folder, or to a run's; None where the folder is neither."""
    for folder in (path, *(path / name for name in EXPORTS)):
        if (folder / CONTENTS).is_file():
            contents = read_json(folder / CONTENTS)
            if not isinstance(contents, dict) or "saves" not in contents:
                raise ModelError(f"{folder / CONTENTS}: not as peftkit writes it; export the run again")
            if contents["saves"] not in EXPORTS:
                raise ModelError(
                    f"{folder}: expected what a run trained, found an export in format '{contents['saves']}'; name the "
                    "run's folder"
                )
            return Trained(folder, contents)
    return None


def find_run(text: str, field: str) -> Trained:
    """The result of a run, by the path of its folder or of its export; raises ModelError or RunError."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ModelError(f"{field}: there is no folder {path}; expected a finished run, or its adapter/ or model/")
    if trained := trained_in(path):
        return trained
    if (path / "checkpoints").is_dir():
        raise RunError(f"{field}: {path} has not finished, so it has no result; resume it with --resume {path}")
    raise ModelError(f"{field}: {path} is not a run of peftkit: no {CONTENTS} in it, nor in its adapter/ or model/")


def find_adapter(model: ModelConfig) -> Trained:
    """The adapter that ``model.adapter`` names: a run, an exported folder, or one that peft wrote.

    Raises:
        ModelError: there is none, or it is pickled, or its run trained the base itself.
        RunError: the run has not finished.
    """
    text = str(model.adapter)
    path = Path(text.removeprefix(RUN)).expanduser()
    own = None if text.startswith(RUN) or not path.is_dir() else trained_in(path)
    if own is None and (path / ADAPTER_CONFIG).is_file():
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise ModelError(
                f"model.adapter: {path} has no {ADAPTER_WEIGHTS}; expected safetensors, since other files can run code "
                "when they are loaded"
            )
        return Trained(path, {})
    trained = own or find_run(text.removeprefix(RUN), "model.adapter")
    if not trained.is_adapter:
        raise ModelError(
            f"model.adapter: {path} holds a whole model (method {trained.contents['method']}) and no adapter; stand on "
            f"it with model.source={path}, without model.adapter"
        )
    return trained


def check_base(adapter: Trained, source: str, folder: Path, fingerprint: str) -> str:
    """What of the adapter's base could be compared with the recipe's, in words; raises ModelError if it is another.

    Args:
        source: the recipe's base.
        folder, fingerprint: where it lies, and its ``peftkit.models.sources.fingerprint``.
    """
    if adapter.contents:
        if (wanted := str(adapter.contents.get("fingerprint"))) != fingerprint:
            raise ModelError(
                f"model.adapter: {adapter.path} was trained on {adapter.contents.get('source')} (fingerprint "
                f"{wanted[:12]}), and model.source={source} is another base ({fingerprint[:12]}); set model.source to "
                "the adapter's base, or leave it at what that run named"
            )
        return f"fingerprint {fingerprint[:12]} of the base"
    named = str(read_json(adapter.path / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if named and named in (source, str(folder)):
        return f"name of the base ({named}) and shapes"
    if named and Path(named).expanduser().is_dir():
        if Path(named).expanduser().resolve() == folder.resolve():
            return f"folder of the base ({named}) and shapes"
        raise ModelError(
            f"model.adapter: {adapter.path} was trained on {named}, and model.source is {source}; set model.source to "
            "it, or change base_model_name_or_path in adapter_config.json if both are the same model"
        )
    is_local = not named or named.startswith((".", "/", "~")) or Path(source).exists()
    if is_local:
        return f"shapes only: {named or 'no base'} is named in {ADAPTER_CONFIG}, which cannot be compared with {source}"
    raise ModelError(
        f"model.adapter: {adapter.path} was trained on {named}, and model.source is {source}; set model.source={named}"
    )


def merged_folder(adapter: Trained, base: ModelConfig | None, fingerprint: str) -> Path:
    """The folder of the plain model with an adapter merged, in fp32; written and proven at the first call.

    Args:
        base: what a peft adapter stands on; None for a run, whose recipe names it.
        fingerprint: of that base.

    Raises:
        ModelError: the adapter cannot be merged, or does not fit its base.
        ExportError: the merged model gives other outputs than base and adapter.
    """
    from peftkit.system import cache  # which imports NumPy

    key = hashlib.sha256(f"{FORMAT} {adapter.digest} {fingerprint}".encode()).hexdigest()
    folder = cache.cache_folder("merged") / key[:32]
    if cache.is_intact(folder, hashed=False):  # hashing gigabytes at each start takes longer than reading them
        return folder
    exporter = EXPORTERS.get("merged")()
    with cache.cached_entry(folder, lambda staging: exporter.write_base(adapter.path, base, staging)):
        return folder
