"""Where a base model comes from: the hub, a local folder, an installed package, a GGUF file, or an earlier run.

No weights are loaded here. Code that comes with a model is never run, and only safetensors weights are accepted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import ModelError
from peftkit.models import stages
from peftkit.models.json_files import read_json
from peftkit.models.stages import Trained
from peftkit.schema.recipe import ModelConfig
from peftkit.schema.types import Stage
from peftkit.system.files import file_digest

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
PACKAGE = "package:"


@dataclass(frozen=True)
class ResolvedSource:
    """A base model that exists (a hub id is only checked when it is downloaded)."""

    kind: Literal["hub", "folder", "package", "gguf", "merged"]
    location: str  # hub id, or the local folder; of "merged" the adapter's
    revision: str | None = None  # commit, tag or branch of a hub id
    gguf_file: str | None = None  # name of the GGUF file inside ``location``
    trained: Trained | None = None  # the run or adapter that the model comes from
    base: ModelConfig | None = None  # of an adapter to be merged: what it is merged into; None: its run names it


def resolve(model: ModelConfig) -> ResolvedSource:
    """Locates a recipe's base model without the network; raises ModelError if it is neither there nor a hub id."""
    if model.adapter_use == "merge":
        adapter = stages.find_adapter(model)
        plain = model.model_copy(update={"adapter": None, "adapter_use": None})
        return ResolvedSource("merged", str(adapter.path.resolve()), trained=adapter, base=plain)
    text = model.source
    if text.startswith(stages.RUN):
        return _from_run(stages.find_run(text.removeprefix(stages.RUN), "model.source"))
    if text.startswith(PACKAGE):
        return _from_package(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"model.source: there is no file {path}")
        return ResolvedSource("gguf", str(path.parent.resolve()), gguf_file=path.name)
    if path.is_dir():
        if trained := stages.trained_in(path):
            return _from_run(trained)
        if (path / "recipe.yaml").is_file() and (path / "checkpoints").is_dir():
            stages.find_run(text, "model.source")  # raises: it has not finished
        check_config(path)
        return ResolvedSource("folder", str(path.resolve()))
    if path.is_file():
        raise ModelError(f"model.source: {text} is a file; expected the model's folder, or a .gguf file")
    if text.startswith((".", "/", "~")) or not HUB_ID.match(text):
        raise ModelError(
            f"model.source: there is no folder {text}; expected a hub id (owner/name), ./folder, file.gguf or "
            "package:NAME, or run:PATH"
        )
    return ResolvedSource("hub", text, model.revision)


def folder_of(source: ResolvedSource, *, weights: bool = True) -> Path:
    """A local folder with the model, or with config and tokenizer only, downloaded or dequantized where necessary.

    Raises:
        HubError: the model cannot be downloaded.
        ModelError: no safetensors weights, or the model needs code of its own.
    """
    if source.kind == "hub":
        from peftkit.models.hub import download

        folder = download(source.location, source.revision, weights=weights)
    elif source.kind == "merged":
        folder = _merged(source)
    elif source.gguf_file:
        from peftkit.models import gguf

        folder = gguf.dequantize(Path(source.location) / source.gguf_file)
    else:
        folder = Path(source.location)
    check_config(folder)
    if weights:
        check_weights(folder)
    return folder


def check_config(folder: Path) -> dict[str, Any]:
    """The model's config as a dict; raises ModelError when it is missing, unreadable, or asks for its own code."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: expected config.json of a model, found {_listing(folder)}")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(config).__name__}")
    if "auto_map" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
            raise ModelError(
                f"{folder}: model type '{kind}' needs code of its own (auto_map in config.json), which is never run; "
                "choose a model whose type is part of transformers"
            )
    return config


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; raises ModelError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: expected a base model, found an adapter: set model.source to its base and "
            "model.adapter to this folder, or load the adapter with peftkit.load(folder)"
        )
    if files:
        return files
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    if pickled:
        raise ModelError(
            f"{folder}: expected safetensors weights, found {', '.join(pickled[:4])}: such files can run code "
            "when they are loaded, so they are refused. If you trust them, convert them once with "
            "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` in plain transformers"
        )
    raise ModelError(f"{folder}: expected safetensors weights, found {_listing(folder)}")


def fingerprint(folder: Path) -> str:
    """SHA-256 over config, weights and vocabulary of a model folder.

    A file in the hub's cache links to a blob that is named by its SHA-256. Any other file is hashed once per path, size
    and modification time.
    """
    total = hashlib.sha256()
    for path in [folder / "config.json", *check_weights(folder), *sorted(folder.glob("tokenizer*.json"))]:
        if path.is_file():
            blob, stat = path.resolve(), path.stat()
            is_hub_blob = re.fullmatch(r"[0-9a-f]{64}", blob.name)
            digest = blob.name if is_hub_blob else _file_digest(blob, stat.st_size, stat.st_mtime_ns)
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


@functools.cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    return file_digest(path)


def stages_of(source: ResolvedSource) -> tuple[Stage, ...]:
    """The earlier trainings that a base model comes from, the first one first."""
    trained = source.trained
    if trained is None:
        return ()
    if not trained.is_adapter:
        return (*trained.earlier, trained.stage("taken whole", "the model is whole"))
    below = () if source.base is None else stages_of(resolve(source.base))
    checked = "its own base, as its run names it" if source.base is None else _checked_base(source)[0]
    return (*(trained.earlier or below), trained.stage("merged", checked))


def _from_run(trained: Trained) -> ResolvedSource:
    location = str(trained.path.resolve())
    if trained.is_adapter:
        return ResolvedSource("merged", location, trained=trained)
    check_config(trained.path)
    return ResolvedSource("folder", location, trained=trained)


def _merged(source: ResolvedSource) -> Path:
    """The model with its adapter merged; raises ModelError if ``model.source`` is not the adapter's base."""
    trained = source.trained
    assert trained is not None
    if source.base is None:
        return stages.merged_folder(trained, None, str(trained.contents["fingerprint"]))
    _, mark = _checked_base(source)
    return stages.merged_folder(trained, None if trained.contents else source.base, mark)


def _checked_base(source: ResolvedSource) -> tuple[str, str]:
    """By what the base to merge into was compared with the adapter's own, and its fingerprint."""
    assert source.trained is not None
    assert source.base is not None
    folder = folder_of(resolve(source.base))
    mark = fingerprint(folder)
    return stages.check_base(source.trained, source.base.source, folder, mark), mark


def _from_package(name: str) -> ResolvedSource:
    """Reads the installed distribution's list of files; the package is never imported."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"model.source: package '{name}' is not installed; run `pip install {name}`") from None
    paths = [Path(str(file.locate())) for file in files if file.name == "config.json" or file.name.endswith(".gguf")]
    folders = [path.parent for path in paths if path.name == "config.json" and _is_model_config(path)]
    if folders:
        folder = min(folders, key=lambda path: (len(path.parts), str(path)))
        check_config(folder)
        return ResolvedSource("package", str(folder.resolve()))
    ggufs = sorted(path for path in paths if path.suffix == ".gguf" and path.is_file())
    if ggufs:
        return ResolvedSource("gguf", str(ggufs[0].parent.resolve()), gguf_file=ggufs[0].name)
    raise ModelError(f"model.source: package '{name}' contains neither a model's config.json nor a .gguf file")


def _is_model_config(path: Path) -> bool:
    """Tells a model's config.json from a sentence encoder's 1_Pooling/config.json."""
    with contextlib.suppress(ModelError):
        return "model_type" in read_json(path)
    return False


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}" if names else "an empty folder"
