"""The process that is measured once on a machine: what the libraries take, and how much the allocator holds on to.

Imports what a run imports and trains a tiny adapted model (its resident set is the framework's share), then runs a
model of plain blocks for a few passes of 1,024 tokens whose live bytes are known from a trace, and compares.
Prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

PASSES = ((2, 512), (8, 128), (4, 256), (2, 512))
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 2048}  # fmt: skip


def main() -> None:
    """Measures, and prints."""
    import accelerate
    import datasets
    import torch

    from peftkit.evaluation import decisions
    from peftkit.models import dtypes
    from peftkit.system.memory import bound_kernel_cache
    from peftkit.training import loop

    bound_kernel_cache()
    taken = (accelerate, datasets, decisions, loop)  # imported for the memory that they take
    assert all(taken)
    dtypes.silence_libraries()
    torch.set_num_threads(int(sys.argv[1]))
    dtype = torch.bfloat16 if dtypes.native_bf16() else torch.float32
    tiny = _adapted({**SIZES, "num_hidden_layers": 2, "hidden_size": 72, "vocab_size": 128}, dtype)
    _train(tiny, dtype, ((2, 64), (4, 32)))
    found: dict[str, Any] = {"framework_bytes": _resident()}
    found["kernel_bytes"] = _kernel_bytes(dtype)
    model = _adapted(SIZES, dtype)
    before = _resident()
    _train(model, dtype, PASSES)
    found["allocator_ratio"] = max(1.0, (_peak() - before) / _traced(dtype))
    found |= _rates(dtype)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        found["cuda_bytes"] = total - free - torch.cuda.memory_reserved()
    print(json.dumps(found))


def _adapted(sizes: dict[str, int], dtype: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftkit.schema.registries import METHODS
    from peftkit.schema.types import LoadedModel

    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(dtype)  # type: ignore[arg-type]
    loaded = LoadedModel(model, None)  # type: ignore[arg-type]
    METHODS.get("lora").model_validate({"kind": "lora"}).apply(loaded)
    from peftkit.models.kernels.attention import cpu_attention
    from peftkit.models.kernels.rms_norm import cpu_normalization
    from peftkit.models.loading import cast_parameters

    cast_parameters(loaded.model, dtype)
    cpu_attention(loaded.model)
    cpu_normalization(loaded.model)
    assert isinstance(loaded.model, torch.nn.Module)
    return loaded.model


def _train(model: Any, dtype: Any, shapes: Any) -> None:
    import torch

    from peftkit.models import dtypes
    from peftkit.models.kernels import linear_cross_entropy
    from peftkit.system.memory import trim_heap

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()
    for rows, tokens in shapes:
        ids = torch.randint(3, 100, (rows, tokens))
        with dtypes.autocast(dtype):
            loss = linear_cross_entropy.loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trim_heap()  # as the loop does


def _traced(dtype: Any) -> int:
    """Live bytes at the peak of the same passes."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from peftkit.heads.causal_lm import NAME, CausalLM
    from peftkit.models.meta_model import move_to_fake
    from peftkit.planning.trace import fake_tensor_mode
    from peftkit.planning.traced_model import Shape, TracedModel
    from peftkit.schema.types import LoadedModel, TaskInfo

    with fake_tensor_mode():
        with unset_fake_temporarily(), torch.device("meta"):
            model = _adapted(SIZES, dtype)
        move_to_fake(model)
        from peftkit.models.kernels.attention import cpu_attention

        cpu_attention(model)
        loaded = LoadedModel(model, None)  # type: ignore[arg-type]
        subject = TracedModel(loaded, CausalLM(TaskInfo(NAME)), dtype)
        return max(subject.train(Shape(rows, tokens, rows * (tokens - 1))).peak for rows, tokens in PASSES)


def _kernel_bytes(dtype: Any, times: int = 64) -> float:
    """Growth of the resident set over products of ever new heights, by product; their kernels stay."""
    import torch

    a, b = torch.randn(1024, 384).to(dtype), torch.randn(384, 384).to(dtype)
    made = [a[:rows] @ b for rows in (700, 701)]
    before = _resident()
    for rows in range(900, 900 + times):
        made[0] = a[:rows] @ b
    return max(0.0, (_resident() - before) / times)


def _rates(dtype: Any) -> dict[str, float]:
    """Products and bytes a second, and seconds of an operator that does next to nothing."""
    import torch

    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    wide, small = torch.randn(8 * 2**20), torch.randn(16)
    return {
        "flops_a_second": 2 * 1024**3 / _seconds(lambda: a @ b),
        "bytes_a_second": 3 * 4 * wide.numel() / _seconds(lambda: wide + wide),
        "seconds_an_operator": _seconds(lambda: small + small, 2000),
    }


def _seconds(work: Any, times: int = 8) -> float:
    work()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(times):
            work()
        best = min(best, (time.perf_counter() - started) / times)
    return best


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
