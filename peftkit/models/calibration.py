"""The blocks of a model, one after the other, quantized for what they read: see ``nf4_rounding``.

Each block reads what the blocks before it make once they are quantized, and within a block the layers that read later
read what the earlier ones make (attention's output projection what quantized queries, keys and values bring). Rows go
through one at a time; of each, only what the next block reads is kept. No architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models.blocks import find_blocks
from peftkit.models.nf4_rounding import requantize

Forward = Callable[[nn.Module, dict[str, Tensor]], Any]


@dataclass
class _Row:
    """What one row brings to the blocks."""

    stream: Tensor
    """What the next block reads, [1, tokens, width]."""
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """The other arguments of each block: masks, rotations."""


def calibrate(
    whole: nn.Module, packed: nn.Module, batches: Sequence[dict[str, Tensor]], forward: Forward,
    advance: Callable[[int], None] = lambda blocks: None,
) -> int:  # fmt: skip
    """Quantizes the linear layers within the blocks of ``packed`` anew; returns how many.

    Args:
        whole: the model before it was quantized. Its blocks are left with what the quantized ones hold.
        packed: the same model with bitsandbytes' NF4 layers.
        batches: rows to calibrate on, without padding.
        forward: has a model read a batch.
        advance: told 1 after each block.

    Raises:
        ModelError: there are no blocks, or something happens to what one block makes before the next one reads it.
    """
    name, blocks = find_blocks(whole)
    twins = packed.get_submodule(name)
    with torch.no_grad():
        rows = [_captured(blocks, lambda batch=batch: forward(whole, batch)) for batch in batches]  # type: ignore[misc]
        changed = 0
        for number, block in enumerate(blocks):
            changed += _calibrate_block(block, twins.get_submodule(str(number)), rows, number)
            for row in rows:
                row.stream = _through(block, row, number)
            advance(1)
    return changed


def _captured(blocks: nn.ModuleList, run: Callable[[], Any]) -> _Row:
    """What the first block reads of a row, and what each one is told besides."""
    streams: list[Tensor] = []
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    made: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = dict(kwargs)
        streams.append(args[0] if args else kept.pop("hidden_states"))
        others.append((args[1:], kept))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        made.append(_first(output))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if len(streams) != len(blocks) or not all(map(torch.equal, made, streams[1:])):
        raise ModelError(
            "calibration goes from block to block, and in this model a block does not read just what the one before it "
            "made; use quantization.kind=nf4, which rounds without calibration"
        )
    return _Row(streams[0], others)


def _calibrate_block(block: nn.Module, twin: nn.Module, rows: Sequence[_Row], number: int) -> int:
    changed = 0
    for names in _groups(block, twin, rows[0], number):
        with _reading(block.get_submodule(names[0])) as gram:
            for row in rows:
                _through(block, row, number)
        originals = [block.get_submodule(name) for name in names]
        held = requantize([twin.get_submodule(name) for name in names], [_matrix(one) for one in originals], gram())
        for original, weight in zip(originals, held):
            _matrix(original).copy_(weight)
        changed += len(names)
    return changed


def _groups(block: nn.Module, twin: nn.Module, row: _Row, number: int) -> list[list[str]]:
    """The quantized layers of a block in the order in which they read; those that read the same tensor together."""
    read: list[tuple[Tensor, list[str]]] = []

    def reader(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            same = next((names for seen, names in read if seen is args[0]), None)
            if same is None:
                read.append((args[0], [name]))  # keeps the tensor, so that no other takes its place
            else:
                same.append(name)

        return hook

    quantized = [name for name, module in twin.named_modules() if type(module).__name__ == "Linear4bit"]
    handles = [block.get_submodule(name).register_forward_pre_hook(reader(name)) for name in quantized]
    try:
        _through(block, row, number)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in read]


@contextmanager
def _reading(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Sums up X Xᵀ over what a layer reads; [in, in] in fp32."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1]).float()
        if not found:
            found.append(inputs.new_zeros(inputs.shape[1], inputs.shape[1]))
        found[0].addmm_(inputs.T, inputs)

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield lambda: found[0]
    finally:
        handle.remove()


def _through(block: nn.Module, row: _Row, number: int) -> Tensor:
    args, kwargs = row.others[number]
    return _first(block(row.stream, *args, **kwargs))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _matrix(layer: Any) -> Tensor:
    """The weight as a view of [out, in]; Conv1D keeps it the other way."""
    weight: Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T
