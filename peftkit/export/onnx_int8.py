"""INT8 weights for an ONNX file, by ONNX Runtime's own quantizer: a quarter of the size, matmuls in INT8.

Weights have one scale per output channel; activations are quantized as they come, without calibration rows (dynamic
quantization). The last layer, which gives the logits, stays in fp32. Weights use 7 of the 8 bits: 8 would overflow on
processors that add pairs of products in 16 bits (x86 without VNNI).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINEAR = frozenset({"MatMul", "Gemm"})


def quantize(file: Path) -> None:
    """Replaces the weights of matmuls and embeddings in the file by INT8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(str(file))
    add_pre_process_metadata(model)  # torch exports shapes, and an optimized graph
    quantize_dynamic(
        model, file, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
        nodes_to_exclude=last_layers(model.graph),
    )  # fmt: skip


def last_layers(graph: Any) -> list[str]:
    """Names of the matmuls with weights that are nearest to the output."""
    weights = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    names, seen, pending = [], set(), [output.name for output in graph.output]
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in LINEAR and weights & set(node.input):
            names.append(node.name)
        else:
            pending += node.input
    return names
