"""Files next to an export that other libraries than transformers and peft need, as the head names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.export.manifest import Manifest
from peftkit.models.context import usable_length
from peftkit.system.files import write_json


def write(folder: Path, contents: Manifest, config: Any, tokenizer: Any) -> None:
    """Writes them into the folder of an export; ``config`` is the model's."""
    width = int(getattr(config.get_text_config(), "hidden_size", 0))
    length = usable_length(tokenizer, contents.max_length)
    for name, values in contents.head.library_files(contents.pooling, width, length).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)
