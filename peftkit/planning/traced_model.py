"""One forward and backward pass of a recipe's model, run without data: its peak in memory, its products, its traffic.

A model of many equal blocks is run with three and with five of them, and the figures continued along that line; a model
whose blocks differ is run whole.
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
from peftkit.models.blocks import find_blocks
from peftkit.models.kernels import linear_cross_entropy
from peftkit.planning.trace import Traced, Tracer
from peftkit.schema.head import Head
from peftkit.schema.types import LoadedModel

FEW, MORE = 3, 5
"""Blocks with which a long stack is run."""


@dataclass(frozen=True)
class Shape:
    """A pass's rectangle of tokens."""

    rows: int
    tokens: int
    scored: int
    """Tokens of it that carry the loss."""
    packed: bool = False
    """Whether a row holds several documents."""


@dataclass
class TracedModel:
    """The model that is run, under its head."""

    loaded: LoadedModel
    head: Head
    dtype: torch.dtype
    gpu: bool = False

    def __post_init__(self) -> None:
        base = packing.underlying(self.loaded.model)
        self._vocabulary = int(base.config.get_text_config().vocab_size)
        if self.head.writes_text:  # what trials on real weights would find
            packing._ABILITIES[base] = packing.Abilities(("positions", ""), True)
            linear_cross_entropy._SHAPING[base] = linear_cross_entropy._declared(base.config.get_text_config())[-1]

    def train(self, shape: Shape, passes: int = 1) -> Traced:
        """Forward and backward; with several passes, on the gradients that the first has left."""
        return self._measured(lambda: self._run(shape, passes))

    def evaluate(self, shape: Shape) -> Traced:
        """A forward pass that keeps nothing."""
        return self._measured(lambda: self._run(shape, 0))

    def _measured(self, run: Any) -> Traced:
        try:
            _, blocks = find_blocks(self.loaded.model)
        except ModelError:
            return run()  # type: ignore[no-any-return]
        count = len(blocks)
        if count <= MORE + 1 or len({_signature(block) for block in blocks}) > 1:
            return run()  # type: ignore[no-any-return]
        with _only(blocks, FEW):
            few = run()
        with _only(blocks, MORE):
            more = run()
        return continued(few, more, count)

    def _run(self, shape: Shape, passes: int) -> Traced:
        model = self.loaded.model
        model.train(passes > 0)
        batch = self.head.example_batch(shape.rows, shape.tokens, packed=shape.packed)
        tracer = Tracer(vocabulary=self._vocabulary, scored=(shape.rows * (shape.tokens - 1), shape.scored))
        tracer.ignore([*model.parameters(), *model.buffers()])
        with tracer, _as_on_a_gpu() if self.gpu else contextlib.nullcontext():
            if passes == 0:
                with torch.no_grad(), self._precision():
                    self.head.outputs(model, batch, self.loaded.pooling)
            for _ in range(passes):
                with self._precision():
                    loss = self.head.loss(model, batch, self.loaded.pooling)
                loss.backward()
                del loss
        found = tracer.finish()
        model.zero_grad(set_to_none=True)
        if passes > 1:
            found = replace(found, flops=found.flops // passes, moved=found.moved // passes,
                            operators=found.operators // passes)  # fmt: skip
        return found

    def _precision(self) -> Any:
        enabled = self.dtype != torch.float32
        return torch.autocast("cpu", dtype=self.dtype if enabled else torch.bfloat16, enabled=enabled)


def _signature(block: torch.nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())


@contextlib.contextmanager
def _only(blocks: torch.nn.ModuleList, count: int) -> Iterator[None]:
    """Leaves the first blocks of a stack and its last in place for a while: the last may read one token alone."""
    whole = blocks._modules
    kept = [*list(whole.values())[: count - 1], list(whole.values())[-1]]
    blocks._modules = {str(number): block for number, block in enumerate(kept)}
    try:
        yield
    finally:
        blocks._modules = whole


def continued(few: Traced, more: Traced, count: int) -> Traced:
    """The line through two stacks, at the length of the real one."""

    def at(low: int, high: int) -> int:
        return int(high + (high - low) / (MORE - FEW) * (count - MORE))

    parts, mapped = (
        {name: at(low.get(name, 0), high[name]) for name in high}
        for low, high in ((few.parts, more.parts), (few.mapped, more.mapped))
    )
    return Traced(at(few.peak, more.peak), parts, mapped, at(few.end, more.end), at(few.flops, more.flops),
                  at(few.moved, more.moved), at(few.operators, more.operators), more.kernels)  # fmt: skip


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Passes go the way that they take on CUDA, for a while."""
    token = linear_cross_entropy.AS_ON_A_GPU.set(True)
    try:
        with _gpu_kernels():
            yield
    finally:
        linear_cross_entropy.AS_ON_A_GPU.reset(token)


class _gpu_kernels(TorchFunctionMode):  # a context manager, named as one is used
    """What CUDA does otherwise: normalization in fp32 under autocast, a fused attention that has dropout as well."""

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
    """Dropout whose mask takes a byte an element."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x
