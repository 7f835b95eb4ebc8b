"""Adapters in a format of our own, for what peft has no format for: bottleneck adapters and trained biases.

    adapter_config.json          peft_type "PEFTKIT_…", the type, the base, and the adapters' shapes
    adapter_model.safetensors    every trained tensor under its parameter's name

Of trained biases plain transformers needs nothing but ``model.load_state_dict(tensors, strict=False)``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from peftkit.errors import ModelError
from peftkit.export import weight_changes
from peftkit.export.weight_changes import Delta, Deltas
from peftkit.methods.layers import bottleneck
from peftkit.methods.layers.bottleneck import AdapterShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPE = "PEFTKIT_ADAPTER_USE_peftkit.load"
"""In the place of peft's own types: peft does not know it, and names it when it says so."""
FORMAT = 1


def save(folder: Path, model: Any, method: str, base: str, revision: str | None) -> None:
    """Writes a trained model's delta into an existing folder."""
    shapes = [adapter.shape.to_json() for adapter in bottleneck.adapters(model)]
    config = {
        "peft_type": TYPE,
        "type": method,
        "format": FORMAT,
        "base_model_name_or_path": base,
        "revision": revision,
        "adapters": shapes,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weight_changes.trained(model), folder / WEIGHTS, metadata={"format": "pt"})


def is_delta(folder: Path) -> bool:
    """Whether an exported adapter is in this format, and not in peft's."""
    file = folder / CONFIG
    if not file.is_file():
        return False
    values = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(values, dict) and values.get("peft_type") == TYPE


def read(folder: Path) -> Delta:
    """The delta in a folder.

    Raises:
        ModelError: it is damaged, or of a newer format.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] > FORMAT:
            raise ModelError(f"{file}: written by a newer peftkit (format {values['format']}); upgrade to read it")
        shapes = tuple(AdapterShape.from_json(one) for one in values["adapters"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: not as peftkit writes it ({type(error).__name__}: {error})") from None
    return Delta(shapes, load_file(folder / WEIGHTS))


def put_on(model: Any, folder: Path, name: str = "default") -> Any:
    """A base of transformers with an exported delta on it; raises ModelError where it does not fit."""
    deltas = weight_changes.deltas_of(model) or Deltas(model)
    try:
        deltas.add(name, read(folder))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    return model
