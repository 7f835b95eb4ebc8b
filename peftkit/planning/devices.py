"""Devices by name, and those that are here."""

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
"""GiB of memory by the manufacturer's name."""
UNITS = {"gb": 10**9, "gib": GIB, "g": GIB, "mb": 10**6, "mib": 2**20}


@dataclass(frozen=True)
class Device:
    """Where a run is planned for."""

    name: str
    memory: int
    """Bytes that a run may use."""
    gpu: bool


def named(text: str) -> Device:
    """``8GB``, ``7.5GiB`` or ``rtx4090``; raises RecipeError for anything else.

    A size in GB is taken as cards are sold: 8GB is 8 GiB.
    """
    key = re.sub(r"[\s_]", "", text.lower())
    if key in GPUS:
        return Device(key, GPUS[key] * GIB, True)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|g|mib|mb)", key)
    if size and float(size[1]) > 0:
        unit = GIB if size[2] == "gb" else UNITS[size[2]]
        return Device(f"GPU of {text}", int(float(size[1]) * unit), True)
    raise RecipeError(f"--gpu {text}: expected a size (8GB) or a card: {did_you_mean(key, GPUS)}")


def here(*, gpu: bool = True) -> Device:
    """The device that a run would use now: the first GPU, else (or without ``gpu``) the CPU with what is free."""
    import psutil
    import torch

    if gpu and torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory, True)
    return Device("CPU", int(psutil.virtual_memory().available), False)


def shown(size: float) -> str:
    """Bytes for people, in GB of 10⁹ or MB of 10⁶."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.1f} MB"
