"""How much of the machine training used: matrix products a second over the rate of nothing but matrix products.

Model FLOPs utilization as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with the products counted and
not estimated: what the frozen weights do not need in the backward pass is not counted, and neither is padding.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftkit.models.kernels import compile
from peftkit.system.cache import cache_folder, entry_lock
from peftkit.system.memory import trim_heap

if TYPE_CHECKING:
    from peftkit.training.loop import Loop

SIZES = {"cpu": 2048}
OTHER_SIZE = 8192
REPEATS = 5


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of a few; kept on disk by device, dtype, threads and torch version.

    Takes a second or less, once. The figure is one process's, with the threads that torch has in this one.
    """
    device = torch.device(device)
    path = cache_folder("machine") / f"matmul-{_digest(_describe(device), str(dtype), torch.__version__)}.json"
    with entry_lock(path):
        if not path.is_file():
            path.write_text(json.dumps({"flops_a_second": _measure(device, dtype)}), encoding="utf-8")
        return float(json.loads(path.read_text(encoding="utf-8"))["flops_a_second"])


def flops_per_token(loop: Loop) -> float:
    """Matrix-product FLOPs that training needs for a token of a row of common length, forward and backward.

    Counted on one pass over a row of the mean length; the gradients that it leaves are removed. A single row, for while
    torch counts, it keeps tensors that a pass would free.
    """
    from torch.utils.flop_counter import FlopCounterMode

    split = loop.train_split
    order = np.argsort(np.abs(split.lengths - split.lengths.mean()), kind="stable")
    rows = order[:1]
    batch = loop.stepper.batch(rows)
    loop.module.train()
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    with torch.random.fork_rng(devices=[]), compile.without(), counter:  # inside compiled code nobody can count
        with loop.session.accelerator.autocast():
            loss = loop.module(batch)
        loss.backward()
    loop.module.zero_grad(set_to_none=True)
    loop.module.eval()
    return counter.get_total_flops() / float(split.lengths[rows].sum())


def utilization_metrics(loop: Loop) -> dict[str, float]:
    """``flops_per_token``, ``flops_per_second`` of a process, ``matmul_flops_per_second``, and their ratio."""
    state, session = loop.state, loop.session
    if not state.seconds or getattr(session, "sharded", False):
        return {}  # of sharded weights a pass of one process alone would wait for the others
    needed, rate = flops_per_token(loop), matmul_rate(session.device, session.dtype)
    achieved = needed * state.tokens / state.seconds / session.world_size
    return {
        "flops_per_token": needed,
        "flops_per_second": achieved,
        "matmul_flops_per_second": rate,
        "flops_utilization": achieved / rate,
    }


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = SIZES.get(device.type, OTHER_SIZE)
    trim_heap()  # so that the run's peak stays training's own
    one, other, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(one, other, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_attention() -> dict[Any, Any]:
    """torch counts the attention kernels of GPUs; that of the CPU has the same products."""
    aten = torch.ops.aten
    found: dict[Any, Any] = {}
    forward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if forward is not None and backward is not None:
        found[forward] = lambda query, key, *_, **__: 4 * _products(query, key)
        found[backward] = lambda _, query, key, *__, **___: 10 * _products(query, key)
    return found


def _products(query: Any, key: Any) -> int:
    """Multiplications of one product of attention: query and key come as shapes [rows, heads, tokens, width]."""
    rows, heads, tokens, width = query
    return int(rows * heads * tokens * key[-2] * width)
