"""The dtype policy: in which dtype frozen weights are stored and matrices are multiplied."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch

from peftkit.schema.recipe import ModelConfig

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features for native bf16 matmul: AVX512-BF16 and AMX on x86, "bf16" on ARM."""


@functools.cache
def native_bf16(device: str = "cpu") -> bool:
    """Whether a device type multiplies bf16 in hardware; emulated bf16 is far slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return platform.system() == "Darwin" and int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    return any(flag in cpu_flags() for flag in CPU_FLAGS)


def dtype_for(model: ModelConfig, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of frozen weights and of matmuls: the recipe's, else bf16 where it is native and fp32 elsewhere."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)  # type: ignore[no-any-return]
    return torch.bfloat16 if native_bf16(torch.device(device or "cpu").type) else torch.float32


def autocast(dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The context in which a model with frozen weights in ``dtype`` is run; does nothing for fp32."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the kernel's words; empty where that is not known."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
    flags = (value.split() for name, _, value in lines if name.strip().lower() in {"flags", "features"})
    return frozenset(next(flags, ()))
