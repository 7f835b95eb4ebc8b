"""The two files of a peft adapter: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.export.folder import ADAPTER_CONFIG
from peftkit.models.sources import read_json
from peftkit.system.files import write_json


def save(model: Any, folder: Path) -> None:
    """Writes peft's model as an adapter, without naming a class to import.

    peft names the base's class where an adapter has no task type; only its AutoPeftModel reads that, by an import of
    what the file says.
    """
    model.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub whether embeddings were resized
    file = folder / ADAPTER_CONFIG
    if (config := read_json(file)).get("auto_mapping"):
        write_json(file, {**config, "auto_mapping": None})
