"""A recipe's model, traced without data: memory, FLOPs and bytes moved by one micro-batch.

A model of many equal blocks is traced with three and with five of them, and the results are extrapolated; a model of
different blocks is traced in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from peftkit.errors import ModelError
from peftkit.models import packing
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.dtypes import autocast
from peftkit.models.kernels import linear_cross_entropy
from peftkit.planning.trace import Trace, Tracer
from peftkit.schema.head import Head
from peftkit.schema.types import LoadedModel

FEW, MORE = 3, 5
"""Numbers of blocks with which a long stack is traced."""


@dataclass(frozen=True)
class Shape:
    """The padded shape of a micro-batch."""

    rows: int
    tokens: int
    scored: int
    """Number of tokens that are scored by the loss."""
    packed: bool = False
    """Whether rows hold several documents."""

    @property
    def padded_tokens(self) -> int:
        return self.rows * self.tokens

    def size(self) -> tuple[int, int]:
        """By which shapes are compared: padded tokens, then length."""
        return self.padded_tokens, self.tokens


@dataclass
class TracedModel:
    """A model without data, with its head."""

    loaded: LoadedModel
    head: Head
    dtype: torch.dtype
    gpu: bool = False

    def __post_init__(self) -> None:
        base = unwrap(self.loaded.model)
        self._vocabulary = int(base.config.get_text_config().vocab_size)
        if self.head.writes_text:  # what is otherwise tried on real weights
            packing.assume_supported(base)
        if self.head.writes_text or self.head.scores_tokens:
            linear_cross_entropy.assume_declared_shaping(base)

    def evaluate(self, shape: Shape) -> Trace:
        """Forward without gradients."""
        return self.train(shape, 0)

    def train(self, shape: Shape, micro_batches: int = 1) -> Trace:
        """Forward and backward of micro-batches, whose gradients accumulate."""
        try:
            _, blocks = find_blocks(self.loaded.model)
        except ModelError:
            return self._run(shape, micro_batches)
        count = len(blocks)
        parameters = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in b.named_parameters()] for b in blocks]
        if count <= MORE + 1 or any(each != parameters[0] for each in parameters):
            return self._run(shape, micro_batches)
        with _shortened(blocks, FEW):
            few = self._run(shape, micro_batches)
        with _shortened(blocks, MORE):
            more = self._run(shape, micro_batches)
        return extrapolate(few, more, count)

    def _run(self, shape: Shape, micro_batches: int) -> Trace:
        model = self.loaded.model
        model.train(micro_batches > 0)
        batch = self.head.example_batch(shape.rows, shape.tokens, packed=shape.packed)
        positions = batch["labels"].shape  # of a head with several sequences in an example, other than the shape's
        unscored = int(self.head.predicts_next)  # positions of a row that predict no token of it
        size = positions if len(positions) == 2 else (shape.rows, shape.tokens)
        count = size[0] * (size[1] - unscored)
        tracer = Tracer(vocabulary=self._vocabulary, scored=(count, min(shape.scored, count)))
        tracer.ignore([*model.parameters(), *model.buffers()])
        with tracer, as_on_a_gpu() if self.gpu else contextlib.nullcontext():
            if micro_batches == 0:
                with torch.no_grad(), autocast(self.dtype):
                    self.head.outputs(model, batch, self.loaded.pooling)
            for _ in range(micro_batches):
                with autocast(self.dtype):
                    loss = self.head.loss(model, batch, self.loaded.pooling)
                loss.backward()
                del loss
        trace, count = tracer.finish(), max(1, micro_batches)
        model.zero_grad(set_to_none=True)
        return replace(
            trace, flops=trace.flops // count, moved=trace.moved // count, operators=trace.operators // count
        )


@contextlib.contextmanager
def _shortened(blocks: torch.nn.ModuleList, count: int) -> Iterator[None]:
    """Within the context, a stack has its first blocks and its last, which may compute a single token only."""
    every = blocks._modules
    remaining = [*list(every.values())[: count - 1], list(every.values())[-1]]
    blocks._modules = {str(number): block for number, block in enumerate(remaining)}
    try:
        yield
    finally:
        blocks._modules = every


def extrapolate(few: Trace, more: Trace, count: int) -> Trace:
    """The trace of a stack of ``count`` blocks, from those of two shorter ones."""

    def at(low: Any, high: Any) -> Any:
        if isinstance(high, dict):
            return {name: at(low.get(name, 0), high[name]) for name in high}
        return int(high + (high - low) / (MORE - FEW) * (count - MORE))

    return Trace(**{name: at(value, vars(more)[name]) for name, value in vars(few).items()} | {"kernels": more.kernels})


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the context, a model on the CPU computes as on CUDA, so that it is traced as on CUDA."""
    token = linear_cross_entropy.SIMULATE_GPU.set(True)
    try:
        with _GpuKernels():
            yield
    finally:
        linear_cross_entropy.SIMULATE_GPU.reset(token)


class _GpuKernels(TorchFunctionMode):
    """CUDA's own kernels: normalization in fp32 under autocast, and fused attention that includes dropout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        elif func is F.dropout and not kwargs.get("inplace"):
            return _gpu_dropout(*args, **kwargs)
        elif func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def _gpu_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout with a mask of one byte per element."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x
