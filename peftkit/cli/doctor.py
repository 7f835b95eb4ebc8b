"""``peftkit doctor``: versions, devices, cores, and how many processes a launch really starts.

Run as a module, it is the probe of a launch: each process prints one line, and the parent counts the lines.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes")
MARK = "peftkit-process"
SECONDS = 120


def examine() -> dict[str, Any]:
    """Everything by name, in display order; takes a few seconds, most of them for the launch."""
    from peftkit import __version__
    from peftkit.distributed.launched import ON_CPUS

    return {
        "peftkit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        **_devices(),
        "processes under accelerate launch": launched_processes(),
        "more on a CPU": ON_CPUS.format(processes=2),
        "hub": hub(),
    }


def launched_processes(seconds: float = SECONDS) -> str:
    """Starts ``accelerate launch`` as the user has configured it and counts the processes that start.

    They are counted because with --cpu, accelerate starts one process whatever its configuration says.
    """
    launch = "-m accelerate.commands.accelerate_cli launch --quiet -m peftkit.cli.doctor"
    try:
        done = subprocess.run(
            [sys.executable, *launch.split()], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"unknown: no answer within {seconds:g} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"unknown: the launch failed: {last}"
    return str(done.stdout.count(MARK))


def hub(seconds: float = 5) -> str:
    """Whether the hub (HF_ENDPOINT) answers; an answer of any status counts."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not checked: HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return f"{constants.ENDPOINT} answers ({error.code})"
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached ({error}); local files and packages still work"
    return f"{constants.ENDPOINT} answers"


def _devices() -> dict[str, Any]:
    import psutil
    import torch

    from peftkit.models.dtypes import native_bf16

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    names += ["Apple GPU"] if torch.backends.mps.is_available() else []
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return {
        "accelerators": ", ".join(names) or "none",
        "cores": psutil.cpu_count(logical=False),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "bf16 in hardware": f"{'yes' if native_bf16(kind) else 'no'} ({kind})",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(f"{MARK} {os.environ.get('RANK', '0')}", flush=True)
