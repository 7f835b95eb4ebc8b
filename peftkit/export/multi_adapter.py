"""Several adapters on one base, switched by name: the base is in memory once.

``read`` compares the manifests, so that an adapter that does not fit is refused before any weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import ModelError, RunError
from peftkit.export.folder import ADAPTER_WEIGHTS, ExportFolder, open_export
from peftkit.export.loading import check_adapter_config, check_head, check_same_names
from peftkit.export.manifest import Manifest
from peftkit.export.native_adapters import load_onto, native_adapters
from peftkit.methods.layers.mixed_lora import RowAdapters, mix_lora, unmix_lora, unmixable_reason
from peftkit.models import dtypes
from peftkit.models.tokenizer import tokenizer_in

FIRST = "default"
"""peft's name of the adapter that a run is loaded with."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MIXED_TOLERANCE = {torch.float32: 1e-3}
"""Largest difference of mixed rows from those of one adapter, relative to the logits' spread, by dtype of the base."""
OTHER_TOLERANCE = 0.1


@dataclass(frozen=True)
class AddedAdapter(ExportFolder):
    """A further adapter that was checked, but not loaded."""

    name: str
    tokenizer: Any


def read(path: Path, name: str, *, first: Manifest, taken: Iterable[str]) -> AddedAdapter:
    """Checks that a run's adapter can share the base of the first one; reads everything but the weights.

    Args:
        name: letters, digits, '_' and '-'; not one of ``taken``.
        first: manifest of the run that is loaded.

    Raises:
        RunError: the name cannot be used, or the run is not finished.
        ModelError: trained on another base, with another head or method, or damaged.
    """
    if not NAME.fullmatch(name):
        raise RunError(
            f"{name!r} cannot name an adapter: expected up to 64 letters, digits, '_' and '-', such as kjv or v2-long"
        )
    if name in taken:
        raise RunError(f"an adapter is called '{name}' already; give this one another name")
    export = open_export(path)
    _check_fits(export.path, export.manifest, first)
    check_adapter_config(export.path)
    return AddedAdapter(export.path, export.manifest, export.recipe, name, tokenizer_in(export.path))


def attach(model: Any, added: AddedAdapter) -> None:
    """Loads the weights of a further adapter; the active one stays active.

    Raises:
        RunError: torch or peft uses the name inside the model.
        ModelError: the weights are damaged or do not fit the base.
    """
    from peft.utils import ModulesToSaveWrapper

    native = native_adapters(model) is not None
    if not native:
        _check_free(model, added.name)
    weights = check_head(added.path / ADAPTER_WEIGHTS, added.manifest)
    if native:
        load_onto(model, added.path, added.name)
        return
    device = str(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.float()  # the new head is a copy of it, and was trained in fp32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_same_names reports missing weights
            model.load_adapter(added.path, adapter_name=added.name, torch_device=device)
        check_same_names(model, added.path, weights, added.name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if added.name in model.peft_config:
            model.delete_adapter(added.name)
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{added.path}: the adapter does not fit: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        if added.name in name.split("."):  # peft puts it where the layer's weight is, and that may be offloaded
            parameter.data = parameter.data.to(device)
    model.requires_grad_(False).eval()


def names(model: Any) -> tuple[str, ...]:
    """Names of the adapters on a model; none if the method trained the base itself."""
    native = native_adapters(model)
    return native.names if native is not None else tuple(getattr(model, "peft_config", ()))


def active(model: Any) -> str | None:
    """Name of the active adapter."""
    native = native_adapters(model)
    if native is not None:
        return native.active
    return model.active_adapter if names(model) else None


def activate(model: Any, name: str) -> None:
    """Switches to an adapter."""
    native = native_adapters(model)
    if native is not None:
        native.activate(name)
    else:
        model.set_adapter(name)
    model.requires_grad_(False)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Turns the adapters off within the block, so that the base answers."""
    native, before = native_adapters(model), active(model)
    try:
        if native is None:
            with model.disable_adapter():
                yield
        else:
            native.activate(None)
            yield
    finally:
        if native is not None:
            native.activate(before)
        model.requires_grad_(False)


def mix(model: Any) -> tuple[RowAdapters | None, str]:
    """Lets batches of a language model have rows under several adapters, and under none.

    The model is tried on a few tokens first: rows of a batch must answer as under ``activate`` and ``disabled``.

    Returns:
        What chooses the adapter of each row; or None, and why the adapters cannot be mixed.
    """
    if native_adapters(model) is not None:
        return None, "their method is not LoRA on linear layers"
    if reason := unmixable_reason(model, names(model)):
        return None, reason
    adapters = mix_lora(model, names(model))
    reason = _difference_of_mixed_rows(model, adapters)
    if reason:
        unmix_lora(model)
    return (None, reason) if reason else (adapters, "")


@torch.no_grad()
def _difference_of_mixed_rows(model: Any, adapters: RowAdapters) -> str:
    """How rows of several adapters differ from those that each gives by itself; empty if they do not."""
    embedding = model.get_input_embeddings().weight
    ids = (torch.arange(12, device=embedding.device)[None] * 7919 + 13) % embedding.shape[0]
    order, before, alone = [*adapters.names, None, adapters.names[0]], active(model), []
    with dtypes.autocast(embedding.dtype, embedding.device):
        for name in adapters.names:
            activate(model, name)
            alone.append(model(input_ids=ids).logits)
        with disabled(model):
            alone.append(model(input_ids=ids).logits)
        activate(model, before or FIRST)
        try:
            with adapters.rows(order):
                mixed = model(input_ids=ids.repeat(len(order), 1)).logits
        except (RuntimeError, TypeError, ValueError) as error:
            return f"a layer does not work on rows of tokens ({str(error).splitlines()[0][:200]})"
    expected = torch.cat([*alone, alone[0]]).float()
    difference = float((mixed.float() - expected).abs().max() / expected.std().clamp_min(1e-6))
    allowed = MIXED_TOLERANCE.get(embedding.dtype, OTHER_TOLERANCE)
    return "" if difference <= allowed else f"together they answer otherwise than alone (by {difference:.2g})"


def _check_fits(folder: Path, manifest: Manifest, first: Manifest) -> None:
    if manifest.saves != "adapter" or first.saves != "adapter":
        method = manifest.method if manifest.saves != "adapter" else first.method
        raise ModelError(f"{folder}: method '{method}' trained the base itself; only adapters can share a base")
    if manifest.fingerprint != first.fingerprint:
        raise ModelError(
            f"{folder}: trained on {manifest.source} (fingerprint {manifest.fingerprint[:12]}), but the loaded base is "
            f"{first.source} ({first.fingerprint[:12]}); adapters that share a base must have been trained on it"
        )
    if _head(manifest) != _head(first):
        raise ModelError(
            f"{folder}: trained for {_named(manifest)}, but the loaded run for {_named(first)}; adapters that share a "
            "base must have the same head"
        )
    if manifest.method != first.method:
        raise ModelError(
            f"{folder}: an adapter of method '{manifest.method}' cannot share a base with one of '{first.method}'; "
            "load it by itself"
        )


def _head(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.auto_class, manifest.info.problem_type, manifest.info.labels, manifest.pooling


def _named(manifest: Manifest) -> str:
    labels = f" ({', '.join(manifest.info.labels[:6])})" if manifest.info.labels else ""
    return f"{manifest.info.problem_type.replace('_', ' ')}{labels}"


def _check_free(model: Any, name: str) -> None:
    """Raises RunError for a name inside the model: peft's ModuleDicts and weights are told apart by adapter names."""
    from torch import nn

    inside = {part for parameter, _ in model.named_parameters() for part in parameter.split(".")}
    if name in inside or hasattr(nn.ModuleDict(), name) or name in getattr(model.base_model, "prefix", ""):
        raise RunError(f"the model uses the name '{name}' inside; give the adapter another name")
