"""The output layer of a language model in oneDNN's own layout, for writing several texts at a time on a CPU in fp32.

    logits = x Wᵀ + b

For a few rows, torch's matmul (MKL) reads a weight once for every one or two of them, and the output layer's is the
largest of a model. oneDNN reads one that was reordered for it once. A single row stays with torch, which is faster
then; so the weight, which mostly is that of the embeddings as well, is kept next to the reordered one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.models.blocks import unwrap
from peftkit.models.patching import with_forward

ROWS = 16
"""For which the layout is chosen; it serves any number."""
ATTRIBUTE = "packed_weight"


def pack_output_layer(model: Any) -> bool:
    """Packs the frozen output layer of a language model in place; returns whether it did, on a CPU in fp32."""
    layer: Any = unwrap(model).get_output_embeddings()
    if type(layer) is not nn.Linear or not _can_be_packed(layer.weight) or not is_supported():
        return False
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), ROWS)
    layer.__dict__[ATTRIBUTE] = packed
    packed_class: Any = _packed_class()
    layer.__class__ = packed_class
    return True


@functools.cache
def is_supported() -> bool:
    """Whether this build of torch can reorder weights, and multiply by them."""
    x, weight = torch.ones(2, 16), torch.ones(8, 16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return torch.equal(_multiply(x, packed, None), x @ weight.T)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad


@functools.cache
def _packed_class() -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        single = x.numel() == x.shape[-1]
        return nn.Linear.forward(self, x) if single else _multiply(x, getattr(self, ATTRIBUTE), self.bias)

    return with_forward(nn.Linear, forward)
