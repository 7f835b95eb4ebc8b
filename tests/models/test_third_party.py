"""What the libraries below may load and say."""

import importlib.util
import subprocess
import sys

import pytest

FALLBACKS = """
import torch

@torch.compile(dynamic=False)
def doubled(x):
    return 2 * x

@torch.compile
def negated(x):
    return -x
"""
IMPORT = """
import sys, torch
made = []
compiled = torch.compile = lambda function, **options: made.append((function.__name__, options)) or function
from peftkit.models import third_party
third_party.silence_libraries()
import bitsandbytes
assert torch.compile is compiled and not made, made
assert [bitsandbytes.doubled(3), bitsandbytes.doubled(4), bitsandbytes.negated(5)] == [6, 8, -5]
assert made == [("doubled", {"dynamic": False}), ("negated", {})], made
"""
LEAVING = """
import atexit, gc
atexit.register(lambda: print("frozen" if gc.get_freeze_count() > 10_000 else "collected"))
from peftkit.models import third_party
third_party.silence_libraries()
assert gc.get_freeze_count() < 10_000
"""
PEFT = """
import sys
from peftkit.models import third_party
third_party.silence_libraries()
import peft
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
"""


def _run(code, *paths):
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n{code}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_fallback_kernels_of_bitsandbytes_are_compiled_when_they_are_called(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text(FALLBACKS)
    _run(IMPORT, tmp_path)


def test_a_process_ends_without_looking_for_cycles_and_what_is_to_run_then_runs():
    assert _run(LEAVING) == "frozen\n"


def test_a_bitsandbytes_that_does_not_load_stops_nothing_that_does_not_need_it(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('built for another torch')")
    _run("from peftkit.models import third_party; third_party.silence_libraries()", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_peft_is_imported_without_the_compiler():
    _run(PEFT)
