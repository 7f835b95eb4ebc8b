"""Losses of a language model's output layer on a GPU: peftkit's chunks of several sizes, Liger's, cut-cross-entropy.

    python benchmarks/gpu/loss_kernels.py [--out FILE.json]

Milliseconds of forward and backward (median of ten), memory beyond inputs and weights, whether two runs agree to the
last bit, and the error of the gradient against fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = ((2048, 4096, 128256), (8192, 2048, 128256), (4096, 576, 49152))
"""Scored tokens, width, vocabulary."""
CHUNKS = (32, 128, 256, 512)
"""MiB of peftkit's chunks of logits."""


def contestants() -> dict[str, Callable[[Tensor, nn.Linear, Tensor], Tensor]]:
    """Summed losses of hidden states, output layer and targets."""
    from peftkit.models.kernels import linear_cross_entropy as own

    def chunked(size: int) -> Callable[[Tensor, nn.Linear, Tensor], Tensor]:
        def loss(hidden: Tensor, layer: nn.Linear, targets: Tensor) -> Tensor:
            own.CHUNK_BYTES = size * 2**20
            output = own.OutputLayer(layer, layer.forward, own.Shaping(), layer.out_features)
            return own._FrozenMatrix.apply(hidden, layer.weight, None, targets, output)  # type: ignore[no-any-return]

        return loss

    found = {f"peftkit, {size} MiB": chunked(size) for size in CHUNKS}
    found["torch"] = lambda hidden, layer, targets: F.cross_entropy(layer(hidden).float(), targets, reduction="sum")
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cut-cross-entropy"] = lambda hidden, layer, targets: cce(hidden, layer.weight, targets, reduction="sum")
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["liger"] = lambda hidden, layer, targets: liger(hidden, layer.weight, targets, reduction="sum")
    return found


def measure(loss: Callable[[Tensor, nn.Linear, Tensor], Tensor], tokens: int, width: int, vocabulary: int) -> Any:
    """The figures of one loss at one size."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    layer = nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")

    def step() -> Tensor:
        hidden.grad = None
        loss(hidden, layer, targets).backward()
        assert hidden.grad is not None
        return hidden.grad

    first = step().clone()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        again = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() - before
    exact = torch.cat([reference(part, layer, target) for part, target in zip(hidden.split(256), targets.split(256))])
    return {
        "milliseconds": 1e3 * sorted(times)[5], "peak_mb": peak / 1e6, "deterministic": torch.equal(first, again),
        "gradient_error": float((again.float() - exact).norm() / exact.norm()),
    }  # fmt: skip


def reference(hidden: Tensor, layer: nn.Linear, targets: Tensor) -> Tensor:
    """The gradient in fp32."""
    leaf = hidden.detach().float().requires_grad_()
    F.cross_entropy(leaf @ layer.weight.float().T, targets, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def main() -> None:
    """Prints one line per loss and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "sizes": {}}
    for size in SIZES:
        name = "{} tokens, width {}, vocabulary {}".format(*size)
        results["sizes"][name] = {}
        for contestant, loss in contestants().items():
            try:
                figures = measure(loss, *size)
            except Exception as error:  # a library that does not run here is a result
                figures = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            results["sizes"][name][contestant] = figures
            print(f"{name}: {contestant}: {json.dumps(figures)}", flush=True)
            torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
