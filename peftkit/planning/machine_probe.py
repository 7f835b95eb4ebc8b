"""Measures memory and speed of a machine; ``planning.machine`` runs it once per kind of model, in its own process.

    python -m peftkit.planning.machine_probe THREADS encoder|decoder

Imports what a run imports and trains a tiny adapted model: its resident memory is the framework's. Then trains a larger
model on 1,024 tokens per step, and compares the growth of resident memory with the live bytes of a trace, and the time
of a step with its FLOPs: small matmuls and dropout masks make a step slower than large matmuls alone. The encoder has
the shape of MiniLM, with dropout; the decoder that of SmolLM2, without. Prints one line of JSON with the fields of
``machine.Machine``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from peftkit.models import dtypes
from peftkit.models.kernels.attention import use_cpu_attention
from peftkit.models.kernels.dropout import use_cpu_dropout
from peftkit.models.kernels.rms_norm import use_cpu_rms_norm
from peftkit.models.loading import cast_parameters
from peftkit.models.third_party import silence_libraries
from peftkit.planning.machine import import_libraries
from peftkit.planning.table import usual_task
from peftkit.planning.trace import Trace
from peftkit.runs.environment import peak_memory
from peftkit.schema.head import Head, head_of
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel
from peftkit.system.memory import bound_kernel_cache, trim_heap

SHAPES = ((2, 512), (8, 128), (4, 256), (2, 512), (8, 128), (8, 128), (8, 128))
"""Rows and tokens of each step; the time of the fastest of the last ones counts."""
DECODER = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 2048, "tie_word_embeddings": True}  # fmt: skip
ENCODER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
           "vocab_size": 2048, "num_labels": 2}  # fmt: skip


def main() -> None:
    """Measure the machine and print the results."""
    bound_kernel_cache()
    import_libraries()
    silence_libraries()
    torch.set_num_threads(int(sys.argv[1]))
    decoder = sys.argv[2] == "decoder"
    sizes, head = DECODER if decoder else ENCODER, head_of(usual_task(decoder=decoder)[1])
    dtype = torch.bfloat16 if dtypes.native_bf16() else torch.float32
    tiny = _adapted_model({**sizes, "num_hidden_layers": 2, "hidden_size": 72, "vocab_size": 128}, dtype)
    _train(tiny, head, dtype, ((2, 64), (4, 32)))
    results: dict[str, Any] = {"framework_bytes": _resident_bytes()}
    results["kernel_bytes"] = _kernel_bytes(dtype)
    model = _adapted_model(sizes, dtype)
    before = _resident_bytes()
    seconds = _train(model, head, dtype, SHAPES)
    grown = peak_memory() - before
    traces = _traces(sizes, head, dtype)
    results["allocator_ratio"] = max(1.0, grown / max(trace.peak for trace in traces))
    results |= _rates(traces[-1], seconds)
    print(json.dumps(results))


def _adapted_model(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    encoder = sizes.keys() == ENCODER.keys()
    config_class, model_class = (
        (BertConfig, BertForSequenceClassification) if encoder else (LlamaConfig, LlamaForCausalLM)
    )
    kind = "AutoModelForSequenceClassification" if encoder else "AutoModelForCausalLM"
    loaded = LoadedModel(model_class(config_class(**sizes)).to(dtype), None, auto_class=kind)  # type: ignore
    METHODS.get("lora").model_validate({"kind": "lora", "dropout": 0.1 if encoder else 0.0}).apply(loaded)
    cast_parameters(loaded.model, dtype)
    use_cpu_attention(loaded.model)
    use_cpu_dropout(loaded.model)
    use_cpu_rms_norm(loaded.model)
    return loaded.model


def _train(model: Any, head: Head, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> float:
    """Trains a step of each shape; returns the seconds of the fastest step of the last shape."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()
    seconds: dict[tuple[int, int], float] = {}
    for shape in shapes:
        started = time.perf_counter()
        with dtypes.autocast(dtype):
            loss = head.loss(model, head.example_batch(*shape), "own")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds[shape] = min(time.perf_counter() - started, seconds.get(shape, math.inf))
        trim_heap()  # as the training loop does
    return seconds[shapes[-1]]


def _traces(sizes: dict[str, int], head: Head, dtype: torch.dtype) -> list[Trace]:
    """Traces of the same steps."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from peftkit.models.meta_model import move_to_fake
    from peftkit.planning.trace import fake_tensor_mode
    from peftkit.planning.traced_model import Shape, TracedModel

    with fake_tensor_mode():
        with unset_fake_temporarily(), torch.device("meta"):
            model = _adapted_model(sizes, dtype)
        move_to_fake(model)
        use_cpu_attention(model)
        traced = TracedModel(LoadedModel(model, None), head, dtype)  # type: ignore[arg-type]
        return [traced.train(Shape(rows, tokens, rows * (tokens - 1))) for rows, tokens in SHAPES]


def _kernel_bytes(dtype: torch.dtype, times: int = 64) -> float:
    """Growth of resident memory per matmul of a new height, whose kernel is cached."""
    a, b = torch.randn(1024, 384).to(dtype), torch.randn(384, 384).to(dtype)
    results = [a[:rows] @ b for rows in (700, 701)]
    before = _resident_bytes()
    for rows in range(900, 900 + times):
        results[0] = a[:rows] @ b
    return max(0.0, (_resident_bytes() - before) / times)


def _rates(step: Trace, seconds: float) -> dict[str, float]:
    """Bytes per second and seconds per operator of simple operators; FLOP/s for the rest of a step's time."""
    wide, small = torch.randn(8 * 2**20), torch.randn(16)
    moved = 3 * wide.nbytes / _seconds(lambda: wide + wide)
    operator = _seconds(lambda: small + small, 2000)
    rest = seconds - step.moved / moved - step.operators * operator
    return {
        "flops_per_second": step.flops / max(rest, seconds / 4),  # a hiccup in the measurement must not explode
        "bytes_per_second": moved,
        "seconds_per_operator": operator,
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
