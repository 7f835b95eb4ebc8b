"""Steps of ragged shapes do not pile up memory: free pages go back, and few kernels are kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.system import memory

MODULE = Path(memory.__file__)
HOLES = """
import sys
sys.path.insert(0, {folder!r})
import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [bytes(100_000) for _ in range(2000)]  # below the size from which glibc maps a block by itself
last = blocks[-1]
del blocks
before = resident()
memory.trim_heap_after(memory.STEPS + 1)
assert resident() > before - 10_000_000, "not due yet"
memory.trim_heap_after(memory.STEPS)
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_pages_below_a_block_in_use_go_back_to_the_system():
    code = HOLES.format(folder=str(MODULE.parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000


@pytest.mark.parametrize("setting", memory.CACHES)
def test_the_kernel_caches_are_bounded_unless_the_user_says_otherwise(setting, monkeypatch):
    monkeypatch.delenv(setting, raising=False)
    memory.bound_kernel_cache()
    assert os.environ[setting] == str(memory.KERNELS)
    monkeypatch.setenv(setting, "7")
    memory.bound_kernel_cache()
    assert os.environ[setting] == "7"
