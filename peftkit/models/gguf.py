"""Converts a GGUF file into an ordinary model folder, once, in the cache.

transformers dequantizes a GGUF file with numpy each time it opens one, which takes tens of seconds even for a small
model. The converted folder opens as fast as any other. Its weights are fp32, which represents a block's scale times
an integer exactly; bf16 would change every weight by about 0.13 %, fp16 by 0.02 % (measured on a Q4_1 file). The run
chooses its own dtype later. Deleting the cache only costs the conversion time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import struct
import sys
from pathlib import Path
from typing import Any

from peftkit.errors import ModelError
from peftkit.system import cache, files

MAGIC = b"GGUF"
log = logging.getLogger(__name__)


def dequantize(path: Path) -> Path:
    """The folder (config, safetensors, tokenizer with its chat template) with a GGUF file's model in fp32.

    Written at the first call, under the file's SHA-256 and transformers' version. If several processes call at once,
    one writes it and the others wait.

    Raises:
        ModelError: the file is missing or not GGUF, transformers cannot dequantize its architecture, or the ``gguf``
            package is not installed.
    """
    if not path.is_file():
        raise ModelError(f"model.source: there is no file {path}")
    with path.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelError(f"{path}: expected a GGUF file (its first bytes are {MAGIC!r}), found {magic!r}")
    folder = cache.cache_folder("gguf") / _key(path)
    if not _is_complete(folder):
        with cache.entry_lock(folder):
            if not _is_complete(folder):
                _convert(path, folder)
    return folder


def _key(path: Path) -> str:
    from transformers import __version__

    return f"{files.file_digest(path)[:32]}-{__version__}"


def _is_complete(folder: Path) -> bool:
    """Whether the entry was committed and its files have the sizes in its manifest.

    Sizes only: hashing gigabytes of weights at each start would take longer than reading them.
    """
    try:
        entries = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
        return bool(entries) and all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(path: Path, folder: Path) -> None:
    if not importlib.util.find_spec("gguf"):
        raise ModelError(f"{path.name}: reading GGUF files needs the gguf package: pip install 'peftkit[gguf]'")
    log.info("dequantizing %s once into %s", path.name, folder)
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():  # progress bars are for a terminal, not for a log
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        model, tokenizer = _read(path)
    with cache.new_entry(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _read(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer; the mark of quantization is removed, so that an ordinary model is saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError, struct.error) as error:
        raise ModelError(
            f"{path}: transformers cannot dequantize this GGUF file ({error}); use the original folder or hub id"
        ) from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
