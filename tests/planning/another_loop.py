"""LitGPT's LoRA finetuning of October 2023 as a network and a step of its own, to be planned without data.

Its published peaks were measured at commit 8641822 with PyTorch 2.1 and bitsandbytes 0.41.1. What decides on memory:

- ``lit_gpt/model.py``: queries, keys and values are slices of one product, so the values kept for attention keep all
  three; ``RMSNorm`` (``lit_gpt/rmsnorm.py``) multiplies in bf16 and keeps its input alone; rotary embeddings are
  applied in the wider type that bf16 and their table promote to.
- ``lit_gpt/lora.py``, ``LoRAQKVLinear``: the addition is formed beside the product, padded with zeros for the keys,
  scaled and added, each a tensor of its own. ``GPT.forward`` gives logits in pieces of 128 positions.
- ``finetune/lora.py``: rank 8 on queries and values, dropout 0.05, the first row is the longest; the logits stay
  referenced while the backward pass runs. ``chunked_cross_entropy`` (``lit_gpt/utils.py``) takes piece by piece.
- lightning at 71aed75, ``HalfPrecision`` and ``BitsandbytesPrecision``: ``convert_output`` casts the logits to fp32,
  for it runs where the default dtype is fp32 again. Inside ``init_module`` of the latter every ``torch.nn.Linear``
  becomes a 4-bit one, the output layer too. Weights are quantized from fp16.
- bitsandbytes 0.41, ``autograd/_functions.py``, ``MatMul4Bit``: a product keeps its input (until 0.43.2, #1270), opens
  the weight to fp16 and casts that to bf16.

Adapters are in bf16 as all else, nothing is recomputed, and attention is fused (FlashAttention).

Not explained by that commit: the Llama rows were published 3 to 5 % higher than this. From #606 on, merged between the
commit and the table, ``RMSNorm`` computes in fp32 and keeps such a copy; with it (``wide_norm``) they meet within 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftkit.models.meta_layers import SCALES
from peftkit.models.quantization.stored import WeightFormat
from peftkit.planning.memory import persistent_memory
from peftkit.planning.trace import Tracer, fake_tensor_mode
from peftkit.planning.traced_model import FEW, MORE, extrapolate

DTYPE, RANK, PIECE = torch.bfloat16, 8, 128


@dataclass(frozen=True)
class Sizes:
    """A model's sizes as its configuration in ``lit_gpt/config.py`` gives them."""

    width: int
    layers: int
    heads: int
    between: int
    vocabulary: int
    parallel: bool = False
    """phi: attention and MLP side by side on one layer norm, biases, GELU, half of each head rotated."""
    wide_norm: bool = False
    """RMSNorm in fp32."""


SIZES = {
    "phi-1.5": Sizes(2048, 24, 32, 8192, 51200, parallel=True),
    "llama-2-7b": Sizes(4096, 32, 32, 11008, 32000),
    "llama-2-13b": Sizes(5120, 40, 40, 13824, 32000),
}


def planned_bytes(sizes: Sizes, weight_format: WeightFormat | None, tokens: int, rows: int = 1) -> int:
    """What stays, and the peak of a pass, from the planner's own counting."""

    def at(layers):
        with fake_tensor_mode():
            network = Network(sizes, weight_format, layers)
            tracer = Tracer(vocabulary=sizes.vocabulary)
            tracer.ignore([*network.parameters(), *network.buffers()])
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            with tracer:
                step(network, ids)
            return sum(persistent_memory(network, "adamw").parts().values()), tracer.finish()

    (few, traced_few), (more, traced_more) = at(FEW), at(MORE)
    stays = few + (more - few) * (sizes.layers - FEW) // (MORE - FEW)
    return stays + extrapolate(traced_few, traced_more, sizes.layers).peak


def step(network, ids):
    """Forward, loss and backward; the logits live to the end."""
    logits = network(ids)
    logits = [piece.float() for piece in logits]
    logits[-1] = logits[-1][..., :-1, :]
    targets = ids[:, 1:].split(PIECE, dim=1)
    losses = [
        F.cross_entropy(piece.flatten(0, 1), wanted.flatten(), reduction="none")
        for piece, wanted in zip(logits, targets)
    ]
    torch.cat(losses).mean().backward()


class Network(nn.Module):
    def __init__(self, sizes, weight_format, layers):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width, dtype=DTYPE).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(sizes, weight_format) for _ in range(layers))
        self.norm = norm(sizes)
        self.head = matrix(sizes.width, sizes.vocabulary, sizes.parallel, weight_format)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return [self.head(piece) for piece in self.norm(x).split(PIECE, dim=1)]


class Block(nn.Module):
    def __init__(self, sizes, weight_format):
        super().__init__()
        width, biased = sizes.width, sizes.parallel
        self.sizes, self.norm = sizes, norm(sizes)
        self.joint, self.out = Joint(width, biased, weight_format), matrix(width, width, biased, weight_format)
        self.up = matrix(width, sizes.between, biased, weight_format)
        self.down = matrix(sizes.between, width, biased, weight_format)
        if not sizes.parallel:
            self.second_norm, self.gate = norm(sizes), matrix(width, sizes.between, biased, weight_format)

    def forward(self, x):
        normed = self.norm(x)
        attended = self._attend(normed)
        if self.sizes.parallel:
            return x + attended + self.down(F.gelu(self.up(normed), approximate="tanh"))
        x = x + attended
        normed = self.second_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _attend(self, x):
        rows, tokens, width = x.shape
        parts = self.joint(x).view(rows, tokens, self.sizes.heads, 3, -1).permute(3, 0, 2, 1, 4)
        query, key = rotated(parts[0], self.sizes.parallel), rotated(parts[1], self.sizes.parallel)
        y = F.scaled_dot_product_attention(query, key, parts[2], is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, tokens, width))


class Joint(nn.Module):
    """One matrix for queries, keys and values, with low-rank additions to the first and the last."""

    def __init__(self, width, biased, weight_format):
        super().__init__()
        self.width, self.matrix = width, matrix(width, 3 * width, biased, weight_format)
        self.a = nn.Parameter(torch.empty(2 * RANK, width, dtype=DTYPE))
        self.b = nn.Parameter(torch.empty(2 * width, RANK, dtype=DTYPE))

    def forward(self, x):
        product = self.matrix(x)
        dropped = torch.native_dropout(x, 0.05, True)[0]
        narrow = F.linear(dropped, self.a).transpose(1, 2)
        wide = F.conv1d(narrow, self.b[:, :, None], groups=2).transpose(1, 2)
        places = torch.cat([torch.arange(self.width), torch.arange(2 * self.width, 3 * self.width)])
        padded = wide.new_zeros(product.shape).flatten(0, 1).index_copy(1, places, wide.flatten(0, 1))
        return product + padded.view_as(product) * 2.0


class Norm(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.wide, self.weight = wide, nn.Parameter(torch.empty(width, dtype=DTYPE), requires_grad=False)

    def forward(self, given):
        x = given.float() if self.wide else given
        return (self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5))).to(given.dtype)


class FourBit(nn.Module):
    """A quantized matrix, with bytes as the planner counts them and products as bitsandbytes 0.41 formed them."""

    def __init__(self, columns, rows, biased, weight_format):
        super().__init__()
        size = weight_format.weight_bytes(rows * columns)
        self.shape, self.weight = (
            (rows, columns),
            nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False),
        )
        self.register_buffer(SCALES, torch.empty(weight_format.constant_bytes(rows, columns), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(rows, dtype=DTYPE), requires_grad=False) if biased else None

    def forward(self, x):
        return Opened.apply(x, self.shape, self.bias)


class Opened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, bias):
        ctx.kept, ctx.shape = x, shape
        return F.linear(x, opened(shape), bias)

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, opened(ctx.shape)), None, None


def opened(shape):
    return torch.empty(shape, dtype=torch.float16).to(DTYPE)


def matrix(columns, rows, biased, weight_format):
    if weight_format is not None:
        return FourBit(columns, rows, biased, weight_format)
    return nn.Linear(columns, rows, bias=biased, dtype=DTYPE).requires_grad_(False)


def norm(sizes):
    if sizes.parallel:
        return nn.LayerNorm(sizes.width, dtype=DTYPE).requires_grad_(False)
    return Norm(sizes.width, sizes.wide_norm)


def rotated(x, partly):
    turned = x.shape[-1] // 2 if partly else x.shape[-1]
    table = torch.empty(x.shape[-2], turned)
    one, other = x[..., :turned].chunk(2, dim=-1)
    made = x[..., :turned] * table + torch.cat((-other, one), dim=-1) * table
    return torch.cat((made.type_as(x), x[..., turned:]), dim=-1)
