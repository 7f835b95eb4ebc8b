"""Measures memory and speed of a machine; ``planning.machine`` runs it once, as a process of its own.

Imports what a run imports and trains a tiny adapted model: its resident memory is the framework's. Then trains a larger
model on 1,024 tokens per step, and compares the growth of resident memory with the live bytes of a trace. Prints one
line of JSON with the fields of ``machine.Machine``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from peftkit.models import dtypes
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.kernels.attention import use_cpu_attention
from peftkit.models.kernels.rms_norm import use_cpu_rms_norm
from peftkit.models.loading import cast_parameters
from peftkit.models.third_party import silence_libraries
from peftkit.planning.machine import import_libraries
from peftkit.runs.environment import peak_memory
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, TaskInfo
from peftkit.system.memory import bound_kernel_cache, trim_heap

SHAPES = ((2, 512), (8, 128), (4, 256), (2, 512))
"""Rows and tokens of each step."""
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 2048}  # fmt: skip


def main() -> None:
    """Measure the machine and print the results."""
    bound_kernel_cache()
    import_libraries()
    silence_libraries()
    torch.set_num_threads(int(sys.argv[1]))
    dtype = torch.bfloat16 if dtypes.native_bf16() else torch.float32
    tiny = _adapted_model({**SIZES, "num_hidden_layers": 2, "hidden_size": 72, "vocab_size": 128}, dtype)
    _train(tiny, dtype, ((2, 64), (4, 32)))
    results: dict[str, Any] = {"framework_bytes": _resident_bytes()}
    results["kernel_bytes"] = _kernel_bytes(dtype)
    model = _adapted_model(SIZES, dtype)
    before = _resident_bytes()
    _train(model, dtype, SHAPES)
    results["allocator_ratio"] = max(1.0, (peak_memory() - before) / _traced_bytes(dtype))
    results |= _rates(dtype)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        results["cuda_bytes"] = total - free - torch.cuda.memory_reserved()
    print(json.dumps(results))


def _adapted_model(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(dtype)  # type: ignore[arg-type]
    loaded = LoadedModel(model, None)  # type: ignore[arg-type]
    METHODS.get("lora").model_validate({"kind": "lora"}).apply(loaded)
    cast_parameters(loaded.model, dtype)
    use_cpu_attention(loaded.model)
    use_cpu_rms_norm(loaded.model)
    return loaded.model


def _train(model: Any, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()
    for rows, tokens in shapes:
        ids = torch.randint(3, 100, (rows, tokens))
        with dtypes.autocast(dtype):
            loss = linear_cross_entropy.loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trim_heap()  # as the training loop does


def _traced_bytes(dtype: torch.dtype) -> int:
    """Most live bytes of the same steps."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from peftkit.heads.causal_lm import NAME, CausalLM
    from peftkit.models.meta_model import move_to_fake
    from peftkit.planning.trace import fake_tensor_mode
    from peftkit.planning.traced_model import Shape, TracedModel

    with fake_tensor_mode():
        with unset_fake_temporarily(), torch.device("meta"):
            model = _adapted_model(SIZES, dtype)
        move_to_fake(model)
        use_cpu_attention(model)
        loaded = LoadedModel(model, None)  # type: ignore[arg-type]
        traced = TracedModel(loaded, CausalLM(TaskInfo(NAME)), dtype)
        return max(traced.train(Shape(rows, tokens, rows * (tokens - 1))).peak for rows, tokens in SHAPES)


def _kernel_bytes(dtype: torch.dtype, times: int = 64) -> float:
    """Growth of resident memory per matmul of a new height, whose kernel is cached."""
    a, b = torch.randn(1024, 384).to(dtype), torch.randn(384, 384).to(dtype)
    results = [a[:rows] @ b for rows in (700, 701)]
    before = _resident_bytes()
    for rows in range(900, 900 + times):
        results[0] = a[:rows] @ b
    return max(0.0, (_resident_bytes() - before) / times)


def _rates(dtype: torch.dtype) -> dict[str, float]:
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    wide, small = torch.randn(8 * 2**20), torch.randn(16)
    return {
        "flops_per_second": 2 * 1024**3 / _seconds(lambda: a @ b),
        "bytes_per_second": 3 * 4 * wide.numel() / _seconds(lambda: wide + wide),
        "seconds_per_operator": _seconds(lambda: small + small, 2000),
    }


def _seconds(run: Callable[[], Any], times: int = 8) -> float:
    run()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(times):
            run()
        best = min(best, (time.perf_counter() - started) / times)
    return best


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
