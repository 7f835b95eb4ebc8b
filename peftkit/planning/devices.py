"""The device that a run is planned for: a card, a size of memory, or this machine's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftkit.errors import RecipeError, did_you_mean

GIB = 2**30
GPUS = {
    "t4": 16, "v100": 16, "p100": 16, "a10": 24, "a10g": 24, "l4": 24, "l40s": 48, "a40": 48, "a6000": 48, "a100": 40,
    "a100-80gb": 80, "h100": 80, "h200": 141, "b200": 192, "rtx2080ti": 11, "rtx3060": 12, "rtx3080": 10,
    "rtx3090": 24, "rtx4060": 8, "rtx4060ti": 16, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24, "rtx5080": 16,
    "rtx5090": 32,
}  # fmt: skip
"""GiB of memory by model."""
UNITS = {"gb": GIB, "gib": GIB, "g": GIB, "mb": 10**6, "mib": 2**20}


@dataclass(frozen=True)
class Device:
    """A device to plan for."""

    name: str
    memory: int
    """Available bytes."""
    gpu: bool


def parse_device(text: str) -> Device:
    """A GPU by size (as cards are sold, 8GB means 8 GiB) or model (``rtx4090``); raises RecipeError for other text."""
    key = re.sub(r"[\s_]", "", text.lower())
    if key in GPUS:
        return Device(key, GPUS[key] * GIB, True)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|g|mib|mb)", key)
    if size and float(size[1]) > 0:
        return Device(f"GPU of {text}", int(float(size[1]) * UNITS[size[2]]), True)
    raise RecipeError(f"--gpu {text}: expected a size (8GB) or a model: {did_you_mean(key, GPUS)}")


def local_device(*, gpu: bool = True) -> Device:
    """The device that a run would use here: the first GPU, or else the CPU with its free memory."""
    import psutil
    import torch

    if gpu and torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory, True)
    return Device("CPU", int(psutil.virtual_memory().available), False)


def format_bytes(size: float) -> str:
    """Bytes in GB (10⁹) or MB (10⁶)."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.1f} MB"
