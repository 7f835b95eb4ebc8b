"""In which dtype weights are held and products are formed, and what the libraries below us may say on the terminal."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftkit.schema.recipe import ModelConfig

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Native bf16 products: AVX512-BF16 and AMX on x86, "bf16" among an ARM core's features."""


@functools.cache
def native_bf16(device: str = "cpu") -> bool:
    """Whether a kind of device multiplies bf16 in hardware; emulated bf16 is far slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return platform.system() == "Darwin" and int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    return any(flag in _cpu_flags() for flag in CPU_FLAGS)


def dtype_for(model: ModelConfig, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of frozen weights and products: the recipe's, or bf16 where it is native and fp32 elsewhere."""
    if model.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.dtype]
    kind = torch.device(device or "cpu").type
    return torch.bfloat16 if native_bf16(kind) else torch.float32


def silence_libraries() -> None:
    """Silences what users cannot act on: load reports, weight progress bars, hints about packages that are not needed.

    Errors stay. ``TRANSFORMERS_VERBOSITY``, where it is set, is left to have its way.
    """
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import_bitsandbytes()
    skip_exit_gc()
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@functools.cache
def import_bitsandbytes() -> None:
    """Imports bitsandbytes, where it is installed, without torch's compiler.

    peft imports it whatever is trained, and it hands its fallback kernels to ``torch.compile`` as it is imported, which
    loads Inductor: most of a second. They are compiled when they are first called instead.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    compiled = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(later, **options)
        made = functools.cache(lambda: compiled(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: made()(*args, **kwargs))

    torch.compile = later  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # whoever needs it is told then
            import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiled


@functools.cache
def skip_exit_gc() -> None:
    """Spares the end of the process a search for cycles among all that torch and transformers made: over a second.

    What is registered with ``atexit`` runs as ever, and reference counts still close what is open.
    """
    atexit.register(gc.freeze)


def autocast(dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The context in which a model with frozen weights in ``dtype`` is run; does nothing for fp32."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    lines = [line for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line]
    flags = [line.partition(":")[2] for line in lines if line.split(":")[0].strip().lower() in {"flags", "features"}]
    return frozenset(flags[0].split()) if flags else frozenset()
