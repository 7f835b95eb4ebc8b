"""Adapters that peft has no format for: bottleneck adapters and trained biases, as files and on a model.

    adapter_config.json          peft_type "PEFTKIT_…", the method, the base, and the shapes of added layers
    adapter_model.safetensors    every trained tensor under its parameter's name

A tensor named like a parameter of the base replaces it (a bias, a head); the others belong to bottleneck adapters,
which ``shapes`` describes. To load trained biases, plain transformers needs only
``model.load_state_dict(tensors, strict=False)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.methods.layers import bottleneck_adapter
from peftkit.methods.layers.bottleneck_adapter import AdapterShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPE = "PEFTKIT_ADAPTER_USE_peftkit.load"
"""Written as ``peft_type``, so that the error of peft, which does not know it, says what to use."""
FORMAT = 1
ATTRIBUTE = "peftkit_native_adapters"
"""Attribute of a model that holds its NativeAdapters."""


@dataclass(frozen=True)
class NativeAdapter:
    """The trained tensors of one adapter, and the shapes of the layers that it adds."""

    shapes: tuple[AdapterShape, ...]
    tensors: Mapping[str, Tensor]


class NativeAdapters:
    """The native adapters of one model, of which at most one is active."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters: dict[str, NativeAdapter] = {}
        self._base: dict[str, Tensor] = {}
        self.active: str | None = None
        setattr(model, ATTRIBUTE, self)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def add(self, name: str, adapter: NativeAdapter) -> None:
        """Adds an adapter, active if it is the first; raises ModelError when it does not fit the model."""
        before = self.active
        self._adapters[name] = adapter
        try:
            self.activate(name)
        except (AttributeError, KeyError, RuntimeError) as error:
            del self._adapters[name]
            self.activate(before)
            raise ModelError(f"the adapter does not fit its base: {str(error).splitlines()[0]}") from error
        self.activate(before if before is not None else name)

    def activate(self, name: str | None) -> None:
        """Replaces the active adapter by another, or by none."""
        self._deactivate()
        if name is not None:
            self._insert(self._adapters[name])
            self.active = name

    def _insert(self, adapter: NativeAdapter) -> None:
        bottleneck_adapter.insert(self._model, adapter.shapes)
        added = {name for name, _ in self._model.named_parameters() if f".{bottleneck_adapter.NAME}." in name}
        missing = sorted(added - set(adapter.tensors))
        if missing:
            raise KeyError(f"there are no weights for {missing[0]}")
        for name, tensor in adapter.tensors.items():
            parameter = self._model.get_parameter(name)
            if parameter.shape != tensor.shape:
                raise RuntimeError(f"{name} has shape {list(tensor.shape)}, and the base {list(parameter.shape)}")
            if name not in added:
                self._base[name] = parameter.data
            parameter.data = tensor.to(parameter.device, torch.float32, copy=True)  # as it was trained
            parameter.requires_grad_(False)
            self._widen_norm(name)

    def _widen_norm(self, name: str) -> None:
        """Widens the other vector of a norm to fp32, too: a norm needs its scale and shift in one dtype."""
        module = name.rpartition(".")[0]
        parameters = list(self._model.get_submodule(module).named_parameters(recurse=False))
        if all(parameter.ndim <= 1 for _, parameter in parameters):
            for other, parameter in parameters:
                self._base.setdefault(f"{module}.{other}", parameter.data)
                parameter.data = parameter.data.float()

    def _deactivate(self) -> None:
        bottleneck_adapter.remove(self._model)
        parameters = dict(self._model.named_parameters())
        for name, value in self._base.items():
            if name in parameters:  # an adapter's learned scale is gone already
                parameters[name].data = value
        self._base.clear()
        self.active = None


def native_adapters(model: Any) -> NativeAdapters | None:
    """The native adapters that were loaded onto a model, or None."""
    return getattr(model, ATTRIBUTE, None)


def save(folder: Path, model: nn.Module, method: str, base: str, revision: str | None) -> None:
    """Writes the trained parameters of a model, in fp32, into an existing folder."""
    config = {
        "peft_type": TYPE,
        "type": method,
        "format": FORMAT,
        "base_model_name_or_path": base,
        "revision": revision,
        "adapters": [asdict(adapter.shape) for adapter in bottleneck_adapter.adapters(model)],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: parameter.detach().to("cpu", torch.float32).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: Path) -> NativeAdapter:
    """The adapter in a folder; raises ModelError if it is damaged or of a newer format."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise ModelError(f"{file}: written by a newer peftkit (format {config['format']}); upgrade to read it")
        shapes = tuple(AdapterShape.from_json(values) for values in config["adapters"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: not as peftkit writes it ({type(error).__name__}: {error})") from None
    return NativeAdapter(shapes, load_file(folder / WEIGHTS))


def load_onto(model: Any, folder: Path, name: str = "default") -> Any:
    """Adds the adapter in a folder to a transformers model; raises ModelError if it does not fit."""
    adapters = native_adapters(model) or NativeAdapters(model)
    try:
        adapters.add(name, read(folder))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    return model
