"""Model FLOPs utilization (MFU): the matmul FLOP/s of training over those of a plain matmul on the same machine.

As in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), but with FLOPs that are counted, not estimated:
frozen weights need no weight gradients, and padding is not counted.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.system.cache import cache_folder, entry_lock
from peftkit.system.files import write_json
from peftkit.system.memory import trim_heap

if TYPE_CHECKING:
    from peftkit.training.loop import Loop

SIZES = {"cpu": 2048}
REPEATS = 5
SLOW = 2.0
"""Seconds of a matmul from which on a smaller one is measured."""


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul in this process with its threads, the best of a few.

    Takes a second or less, once: cached by device, dtype, threads and torch version.
    """
    device = torch.device(device)
    processor = f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    place = str(torch.cuda.get_device_name(device)) if device.type == "cuda" else processor
    key = "\n".join((place, str(dtype), torch.__version__))
    path = cache_folder("machine") / f"matmul-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with entry_lock(path):
        if not path.is_file():
            write_json(path, {"flops_a_second": _measure(device, dtype)})
        return float(json.loads(path.read_text(encoding="utf-8"))["flops_a_second"])


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matmuls and attention while it is active.

    torch's FlopCounterMode keeps tensors that training would free: with a row of 2,048 tokens, 4 GB for an 8B model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from peftkit.planning.trace import FLOPS

        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def flops_per_token(loop: Loop) -> float:
    """Matmul FLOPs of training, forward and backward, per token of a row of mean length.

    Counted on a single row, which takes no more memory than a step did.
    """
    split = loop.train_split
    order = np.argsort(np.abs(split.lengths - split.lengths.mean()), kind="stable")
    rows = order[:1]
    batch = loop.stepper.collate(rows)
    loop.module.train()
    counter = FlopCounter()
    eager = torch.compiler.set_stance("force_eager")  # torch cannot count in compiled code
    with torch.random.fork_rng(devices=[]), eager, counter:
        with loop.session.accelerator.autocast():
            loss = loop.module(batch)
        loss.backward()
    loop.module.zero_grad(set_to_none=True)
    loop.module.eval()
    return counter.total / float(split.lengths[rows].sum())


def utilization_metrics(loop: Loop) -> dict[str, float]:
    """``flops_per_token``, ``flops_per_second`` per process, ``matmul_flops_per_second``, and ``flops_utilization``."""
    state, session = loop.state, loop.session
    if not state.seconds or getattr(session, "sharded", False):
        return {}  # with sharded weights, one process's forward would wait for the others
    per_token, rate = flops_per_token(loop), matmul_rate(session.device, session.dtype)
    achieved = per_token * state.tokens / state.seconds / session.world_size
    return {
        "flops_per_token": per_token,
        "flops_per_second": achieved,
        "matmul_flops_per_second": rate,
        "flops_utilization": achieved / rate,
    }


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    trim_heap()  # the run's peak memory should be training's
    size = SIZES.get(device.type, 8192)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 4 * size * size * dtype.itemsize:
        size //= 4  # a run that filled the GPU ends without running out of memory here
    small = 2 * (size // 4) ** 3 / _best_seconds(device, dtype, size // 4, 1)
    # a dtype that the processor emulates would take minutes
    return small if 2 * size**3 > small * SLOW else 2 * size**3 / _best_seconds(device, dtype, size, REPEATS)


def _best_seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
