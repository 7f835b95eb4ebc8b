"""The versions and hardware of a run, as ``environment.json`` records them."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from peftkit.distributed.session import Session
from peftkit.system.cores import cores
from peftkit.system.versions import installed_versions

ENVIRONMENT = "environment.json"
PACKAGES = (
    "peftkit", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes",
)  # fmt: skip
COMPARED = ("python", "machine", "device", "threads", "dtype")
"""Compared when a run is resumed, besides versions."""


def environment(session: Session) -> dict[str, Any]:
    """Versions and hardware; none of the process's environment variables, which may hold secrets."""
    import torch

    device = session.device
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": session.world_size,
        "threads": session.threads,
        "dtype": str(session.dtype).removeprefix("torch."),
        "versions": installed_versions(PACKAGES),
    }


def environment_changes(folder: Path, session: Session) -> list[str]:
    """A line about versions, device and threads that have changed since the run was interrupted, if any have."""
    try:
        saved, current = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8")), environment(session)
        old, new = ({**each["versions"], **{name: each[name] for name in COMPARED}} for each in (saved, current))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    changed = ", ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in names)
    return [f"changed since the run was interrupted: {changed}; the last bits may differ"] if changed else []


def peak_memory() -> int:
    """This process's peak resident set size so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
