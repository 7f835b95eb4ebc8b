"""A base model out of a GGUF file, dequantized once into an ordinary model folder in the cache.

transformers unpacks the quantized blocks with numpy each time it opens a GGUF file, which takes tens of seconds even
for a small model. The folder made here opens as fast as any other. Its weights are fp32: a block's scale times an
integer is exact there, while bf16 would move every weight by about 0.13 % and fp16 by 0.02 % (measured on a Q4_1
file); the dtype in which a run holds them is chosen later. Deleting the cache costs nothing but that time again.
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

KIND = "gguf"
MAGIC = b"GGUF"
log = logging.getLogger(__name__)


def dequantized(path: Path) -> Path:
    """The folder (config, safetensors, tokenizer with its chat template) that holds a GGUF file's model in fp32.

    Made at the first call and found again by the file's SHA-256 and transformers' version; of several processes that
    ask at once, one makes it and the others wait.

    Raises:
        ModelError: the file is missing or not GGUF, its architecture is not one that transformers can unpack, or the
            ``gguf`` package is not installed.
    """
    _check(path)
    folder = cache.cache_folder(KIND) / _key(path)
    if not _is_whole(folder):
        with cache.entry_lock(folder):
            if not _is_whole(folder):
                _convert(path, folder)
    return folder


def _check(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"model.source: there is no file {path}")
    with path.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelError(f"{path}: expected a GGUF file (its first bytes are {MAGIC!r}), found {magic!r}")


def _key(path: Path) -> str:
    from transformers import __version__

    return f"{files.file_digest(path)[:32]}-{__version__}"


def _is_whole(folder: Path) -> bool:
    """Whether the entry was finished and its files have the sizes of its manifest.

    Only sizes: hashing gigabytes of weights again at each start would take longer than reading them.
    """
    try:
        files = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all((folder / name).stat().st_size == held["size"] for name, held in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(path: Path, folder: Path) -> None:
    if not importlib.util.find_spec("gguf"):
        raise ModelError(f"{path.name}: reading GGUF files needs the gguf package: pip install 'peftkit[gguf]'")
    log.info("dequantizing %s once into %s", path.name, folder)
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():  # the progress bars are for a person's terminal, not for a log
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        model, tokenizer = _read(path)
    with cache.new_entry(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _read(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer, no longer marked as quantized: what is saved is an ordinary model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError, struct.error) as error:
        raise ModelError(
            f"{path}: transformers cannot unpack this GGUF file ({error}); use the model's original folder or hub id"
        ) from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
