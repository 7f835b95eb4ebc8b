"""Overhead, allocator and speed of this machine, measured once and cached by processor, versions and measuring code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import PeftkitError
from peftkit.system import cache, files
from peftkit.system.versions import version

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
CUDA_BYTES = 500_000_000
"""Assumed size of a CUDA context if there is no GPU to measure it on."""
GPU_RATES = (100e12, 600e9, 5e-6)
"""Assumed FLOP/s, bytes per second and seconds per operator of any GPU: those of a recent consumer card in bf16, which
are good enough to compare plans."""


@dataclass(frozen=True)
class Machine:
    """Measurements of a machine."""

    framework_bytes: int
    """Resident memory of a process that has imported the libraries and trained a tiny model; of a GPU, its context."""
    allocator_ratio: float
    """Growth of resident memory in training, relative to the most bytes alive at once: the allocator keeps freed memory
    between live tensors."""
    flops_per_second: float
    """Of the matmuls in training steps: small ones are slower than large ones."""
    bytes_per_second: float
    seconds_per_operator: float
    kernel_bytes: float = 0.0
    """Bytes that oneDNN caches for a bf16 matmul of a new shape."""

    def seconds(self, flops: float, moved: float, operators: float) -> float:
        """Time for matmuls, memory traffic and operator calls, one after the other."""
        return flops / self.flops_per_second + moved / self.bytes_per_second + operators * self.seconds_per_operator


def measure(threads: int, *, decoder: bool) -> Machine:
    """The measurements of this machine; takes half a minute in a separate process if they are not cached.

    Args:
        threads: CPU threads.
        decoder: whether a decoder is to be trained, or an encoder: their steps differ in size and in dropout.

    Raises:
        PeftkitError: the measuring process failed.
    """
    path = _file(threads, decoder)
    with cache.entry_lock(path):
        if not path.is_file():
            command = [sys.executable, "-m", "peftkit.planning.machine_probe", str(threads), _kind(decoder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise PeftkitError(f"this machine could not be measured: {last}")
            files.write_text(path, done.stdout.splitlines()[-1])
    return Machine(**json.loads(path.read_text(encoding="utf-8")))


def is_measured(threads: int, *, decoder: bool) -> bool:
    """Whether the measurements are cached."""
    return _file(threads, decoder).is_file()


def _kind(decoder: bool) -> str:
    return "decoder" if decoder else "encoder"


def _file(threads: int, decoder: bool) -> Path:
    code = (Path(__file__).parent / "machine_probe.py").read_text(encoding="utf-8")
    versions = {name: version(name) for name in PACKAGES}
    key = json.dumps([versions, threads, _kind(decoder), sys.version, code, _processor()])
    return cache.cache_folder("machine") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _processor() -> list[object]:
    """What is measured depends on it, and machines of several kinds may share a cache."""
    import torch

    from peftkit.models import dtypes

    capability, limit = torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA")
    return [sorted(dtypes.cpu_flags()), dtypes.native_bf16(), capability, limit]


def gpu() -> Machine:
    """A GPU with assumed rates; the size of its context is measured where there is one."""
    return Machine(_context_bytes(), 1.0, *GPU_RATES)


def for_device(*, on_gpu: bool, threads: int, decoder: bool) -> Machine:
    """The measurements that a plan for a GPU or for this machine's CPU needs; see ``gpu`` and ``measure``."""
    return gpu() if on_gpu else measure(threads, decoder=decoder)


@functools.cache
def _context_bytes() -> int:
    import torch

    if not torch.cuda.is_available():
        return CUDA_BYTES
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def import_libraries() -> None:
    """Import what a training run imports, so that its memory counts as the framework's."""
    import accelerate
    import datasets

    from peftkit.evaluation import decisions

    assert all((accelerate, datasets, decisions))
