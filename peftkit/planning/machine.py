"""What was measured of this machine, once: overhead, allocator, rates. Cached by versions, threads, what measures."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peftkit.errors import PeftkitError
from peftkit.system import cache

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
CUDA_BYTES = 500_000_000
"""Taken for a CUDA context where there is no GPU to measure one on."""
GPU_RATES = (100e12, 600e9, 5e-6)
"""Products and bytes a second, and seconds an operator, of a GPU that is not here: figures of the order of a recent
consumer card in bf16, good for comparing plans with one another."""


@dataclass(frozen=True)
class Machine:
    """Measured figures."""

    framework_bytes: int
    """Resident set of a process that has imported everything and trained a tiny model."""
    allocator_ratio: float
    """Growth of the resident set over passes, by the bytes that are alive at their peak: freed memory that the
    allocator keeps between tensors that live."""
    flops_a_second: float
    bytes_a_second: float
    seconds_an_operator: float
    kernel_bytes: float = 0.0
    """What oneDNN keeps of a bf16 product of a new shape."""
    cuda_bytes: int = CUDA_BYTES
    """Bytes of a GPU's memory that its context takes."""

    def seconds(self, flops: float, moved: float, operators: float) -> float:
        """Time of work: products, traffic and the calls themselves, one after the other."""
        return flops / self.flops_a_second + moved / self.bytes_a_second + operators * self.seconds_an_operator


def measured(threads: int) -> Machine:
    """The figures of this machine; measures them in a process of its own where the cache has none (half a minute).

    Raises:
        PeftkitError: the measuring process failed.
    """
    path = _file(threads)
    with cache.entry_lock(path):
        if not path.is_file():
            command = [sys.executable, "-m", "peftkit.planning.machine_probe", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise PeftkitError(f"this machine could not be measured: {last}")
            path.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    return Machine(**json.loads(path.read_text(encoding="utf-8")))


def is_measured(threads: int) -> bool:
    """Whether ``measured`` has its figures already."""
    return _file(threads).is_file()


def _file(threads: int) -> Path:
    code = (Path(__file__).parent / "machine_probe.py").read_text(encoding="utf-8")
    key = json.dumps([{name: version(name) for name in PACKAGES}, threads, sys.version, code])
    return cache.cache_folder("machine") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def of_gpu(machine: Machine) -> Machine:
    """The same with a GPU's rates."""
    flops, moved, operator = GPU_RATES
    return Machine(machine.framework_bytes, 1.0, flops, moved, operator, 0.0, machine.cuda_bytes)
