"""Where a base model comes from: the hub, a local folder, an installed package, or a GGUF file.

No weights are loaded here. Code that comes with a model is never run, and only safetensors weights are accepted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import ModelError
from peftkit.schema.recipe import ModelConfig
from peftkit.system.files import file_digest

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
PACKAGE = "package:"
MAX_JSON_BYTES = 10_000_000  # configs take kilobytes; tokenizers, which may take more, are read by their own library


@dataclass(frozen=True)
class ResolvedSource:
    """A base model that exists (a hub id is only checked when it is downloaded)."""

    kind: Literal["hub", "folder", "package", "gguf"]
    location: str  # hub id, or the local folder
    revision: str | None = None  # commit, tag or branch of a hub id
    gguf_file: str | None = None  # name of the GGUF file inside ``location``


def resolve(model: ModelConfig) -> ResolvedSource:
    """Locates a recipe's base model without the network; raises ModelError if it is neither there nor a hub id."""
    text = model.source
    if text.startswith(PACKAGE):
        return _from_package(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"model.source: there is no file {path}")
        return ResolvedSource("gguf", str(path.parent.resolve()), gguf_file=path.name)
    if path.is_dir():
        check_config(path)
        return ResolvedSource("folder", str(path.resolve()))
    if path.is_file():
        raise ModelError(f"model.source: {text} is a file; expected the model's folder, or a .gguf file")
    if text.startswith((".", "/", "~")) or not HUB_ID.match(text):
        raise ModelError(
            f"model.source: there is no folder {text}; expected a hub id (owner/name), ./folder, file.gguf or "
            "package:NAME"
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
    elif source.gguf_file:
        from peftkit.models import gguf

        folder = gguf.dequantize(Path(source.location) / source.gguf_file)
    else:
        folder = Path(source.location)
    check_config(folder)
    if weights:
        check_weights(folder)
    return folder


def read_json(file: Path) -> Any:
    """The content of a model's or an adapter's JSON file; raises ModelError if it is not JSON, or far too large."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{file}: expected at most {MAX_JSON_BYTES:,} bytes, found {file.stat().st_size:,}")
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{file}: expected JSON, found brackets nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: expected JSON: {error}") from None


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
            f"{folder}: expected a base model, found an adapter: set model.source to its base, or load the adapter "
            "with peftkit.load(folder)"
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
