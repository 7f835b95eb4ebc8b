"""An ONNX file's weights in 8 bits, by ONNX Runtime's own quantizer: a quarter of the bytes, products in INT8.

Weights have a scale for each output channel; activations are quantized as they come, so that no rows are needed for
it (dynamic quantization). The last layer, which gives the logits, stays in fp32. Weights take 7 of the 8 bits: where a
processor adds pairs of products in 16 bits (x86 without VNNI), 8 would overflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINEAR = frozenset({"MatMul", "Gemm"})


def quantize(file: Path) -> None:
    """Writes the file anew, with the weights of its products and embeddings in INT8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(str(file))
    add_pre_process_metadata(model)  # what torch exports has its shapes, and is optimized already
    quantize_dynamic(
        model, file, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
        nodes_to_exclude=heads(model.graph),
    )  # fmt: skip


def heads(graph: Any) -> list[str]:
    """Names of the products with weights that are nearest to the output."""
    weights = {held.name for held in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found, seen = [], set()
    left = [given.name for given in graph.output]
    while left:
        node = makers.get(left.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in LINEAR and weights & set(node.input):
            found.append(node.name)
        else:
            left += node.input
    return found
