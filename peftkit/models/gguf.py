"""Converts a GGUF file into an ordinary model folder, once, in the cache.

transformers dequantizes a GGUF file with numpy each time it opens one, which takes tens of seconds even for a small
model. The converted folder's weights are fp32, which represents a block's scale times an integer exactly; bf16 would
change every weight by about 0.13 %, fp16 by 0.02 % (measured on a Q4_1 file). The run chooses its own dtype later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from peftkit.errors import ModelError
from peftkit.system import cache, files

MAGIC = b"GGUF"
log = logging.getLogger(__name__)


def dequantize(path: Path) -> Path:
    """The folder (config, safetensors, tokenizer with its chat template) with a GGUF file's model in fp32.

    Written at the first call, under the file's SHA-256 and transformers' version. If several processes call at once,
    one writes it and the others wait. Raises ModelError where the file is missing or not GGUF, transformers cannot
    dequantize its architecture, or the ``gguf`` package is not installed.
    """
    if not path.is_file():
        raise ModelError(f"model.source: there is no file {path}")
    with path.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelError(f"{path}: expected a GGUF file (its first bytes are {MAGIC!r}), found {magic!r}")
    folder = cache.cache_folder("gguf") / f"{files.file_digest(path)[:32]}-{transformers.__version__}"
    if cache.is_intact(folder, hashed=False):  # hashing gigabytes at each start takes longer than reading them
        return folder
    with cache.cached_entry(folder, partial(_convert, path)):
        return folder


def _convert(path: Path, folder: Path) -> None:
    if not importlib.util.find_spec("gguf"):
        raise ModelError(f"{path.name}: reading GGUF files needs the gguf package: pip install 'peftkit[gguf]'")
    log.info("dequantizing %s once into %s", path.name, folder.parent)
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():  # progress bars are for a terminal, not for a log
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        model, tokenizer = _read(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer; the mark of quantization is removed, so that an ordinary model is saved."""
    model: Any
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError, struct.error) as error:
        raise ModelError(
            f"{path}: transformers cannot dequantize this GGUF file ({error}); use the original folder or hub id"
        ) from error
    _set_special_tokens(path, tokenizer)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _set_special_tokens(path: Path, tokenizer: Any) -> None:
    """Sets the special tokens that the file names; transformers 5.17 takes another EOS."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name, key in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}.items():
        if (field := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            if token is not None and getattr(tokenizer, name) != token:
                setattr(tokenizer, name, token)
