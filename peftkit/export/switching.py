"""Several adapters on one base, switched by name: the base lies in memory once.

    added = read(Path("runs/style_shakespeare_lora-…"), "shakespeare", about, taken=["default"])
    attach(model, added)

``read`` compares what the exports say of themselves, so that a wrong one is refused before any weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ModelError, RunError, did_you_mean
from peftkit.export import manifest, own_format
from peftkit.export.loading import (
    ADAPTER_WEIGHTS,
    check_adapter_config,
    check_head,
    check_same_names,
    find_export,
    refuse_pickles,
)
from peftkit.export.manifest import Manifest
from peftkit.export.weight_changes import deltas_of
from peftkit.models.tokenizer import tokenizer_in
from peftkit.schema.recipe import Recipe

FIRST = "default"
"""peft's name of the adapter that a run is loaded with."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class AddedAdapter:
    """A further adapter: where it lies, and with what it was trained."""

    name: str
    folder: Path
    about: Manifest
    recipe: Recipe
    tokenizer: Any


def read(path: Path, name: str, first: Manifest, taken: Iterable[str]) -> AddedAdapter:
    """Checks that a run's adapter can stand beside the first one, and reads all of it but the weights.

    Args:
        path: a run's folder, or an exported one.
        name: letters, digits, '_' and '-'.
        first: the description of the run whose base it is to share.
        taken: names that are in use already.

    Raises:
        RunError: a name that cannot be used, or not a finished run.
        ModelError: trained on another base, with another head or method, or damaged.
    """
    check_name(name, taken)
    folder = find_export(path)
    about = manifest.read(folder)
    _check_fits(folder, about, first)
    refuse_pickles(folder)
    check_adapter_config(folder)
    return AddedAdapter(name, folder, about, Recipe.from_yaml(folder / "recipe.yaml"), tokenizer_in(folder))


def check_name(name: str, taken: Iterable[str]) -> None:
    """Raises RunError unless the name is new, and safe as part of a path and of a module's name."""
    if not NAME.fullmatch(name):
        raise RunError(
            f"{name!r} cannot name an adapter: expected up to 64 letters, digits, '_' and '-', such as kjv or v2-long"
        )
    if name in taken:
        raise RunError(f"an adapter is called '{name}' already; give this one another name")


def check_known(name: str, names: Iterable[str]) -> None:
    """Raises RunError unless there is an adapter of that name."""
    if name not in (known := list(names)):
        raise RunError(f"no adapter is called '{name}': {did_you_mean(name, known)}")


def attach(model: Any, added: AddedAdapter) -> None:
    """Loads the adapter's weights beside those that the peft model has; the active one stays active.

    Raises:
        RunError: the name is one that torch or peft uses inside the model.
        ModelError: the weights are damaged or do not fit the base.
    """
    from peft.utils import ModulesToSaveWrapper

    if deltas_of(model) is not None:
        check_head(added.folder / ADAPTER_WEIGHTS, added.about)
        own_format.put_on(model, added.folder, added.name)
        return
    _check_free(model, added.name)
    names = check_head(added.folder / ADAPTER_WEIGHTS, added.about)
    device = str(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.float()  # the new head is made from it, and was trained in fp32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are looked for below
            model.load_adapter(added.folder, adapter_name=added.name, torch_device=device)
        check_same_names(model, added.folder, names, added.name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if added.name in model.peft_config:
            model.delete_adapter(added.name)
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{added.folder}: the adapter does not fit: {str(error).splitlines()[0]}") from error
    model.requires_grad_(False).eval()


def names(model: Any) -> tuple[str, ...]:
    """Names of the adapters on a model; none where the method trained the base itself."""
    deltas = deltas_of(model)
    return deltas.names if deltas is not None else tuple(getattr(model, "peft_config", ()))


def active(model: Any) -> str | None:
    """Name of the adapter in use."""
    deltas = deltas_of(model)
    if deltas is not None:
        return deltas.active
    return model.active_adapter if names(model) else None


def use(model: Any, name: str) -> None:
    """Switches to an adapter; raises RunError when none has that name."""
    check_known(name, names(model))
    deltas = deltas_of(model)
    if deltas is not None:
        deltas.use(name)
    else:
        model.set_adapter(name)
    model.requires_grad_(False)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within it the base answers, without any adapter."""
    deltas = deltas_of(model)
    try:
        if deltas is None:
            with model.disable_adapter():
                yield
        else:
            before = deltas.active
            deltas.use(None)
            try:
                yield
            finally:
                deltas.use(before)
    finally:
        model.requires_grad_(False)


def _check_fits(folder: Path, about: Manifest, first: Manifest) -> None:
    if about.saves != "adapter" or first.saves != "adapter":
        method = about.method if about.saves != "adapter" else first.method
        raise ModelError(f"{folder}: method '{method}' trained the base itself; only adapters can share a base")
    if about.fingerprint != first.fingerprint:
        raise ModelError(
            f"{folder}: trained on {about.source} (fingerprint {about.fingerprint[:12]}), and the base that is loaded "
            f"is {first.source} ({first.fingerprint[:12]}); adapters that share a base must have been trained on it"
        )
    if _head(about) != _head(first):
        raise ModelError(
            f"{folder}: trained for {_named(about)}, and the run that is loaded for {_named(first)}; adapters that "
            "share a base must have the same head"
        )
    if about.method != first.method:
        raise ModelError(
            f"{folder}: an adapter of method '{about.method}' cannot stand beside one of '{first.method}'; load it "
            "by itself"
        )


def _head(about: Manifest) -> tuple[Any, ...]:
    return about.auto_class, about.info.problem_type, about.info.labels, about.pooling


def _named(about: Manifest) -> str:
    labels = f" ({', '.join(about.info.labels[:6])})" if about.info.labels else ""
    return f"{about.info.problem_type.replace('_', ' ')}{labels}"


def _check_free(model: Any, name: str) -> None:
    """peft keeps adapters in ModuleDicts, and finds an adapter's weights by looking for its name in theirs."""
    from torch import nn

    inside = {part for parameter, _ in model.named_parameters() for part in parameter.split(".")}
    if name in inside or hasattr(nn.ModuleDict(), name) or name in getattr(model.base_model, "prefix", ""):
        raise RunError(f"'{name}' means something inside the model already; give the adapter another name")
