"""The blocks of a model, one after the other, quantized for what they read: see ``nf4_rounding``.

Each block reads what the blocks before it make once they are quantized, and within a block the layers that read later
read what the earlier ones make (attention's output projection what quantized queries, keys and values bring). What a
layer is to give is what it gave in the unquantized model, which goes along beside it, so that it also makes up for what
was lost before it (asymmetric calibration: GPTAQ, Li et al. 2025, arXiv:2504.02692). Tokens count by how much the
training loss depends on what the layer makes of them (GuidedQuant, Kim et al. 2025, arXiv:2505.07004). Rows go through
one at a time; of each, only what the next block reads is kept. No architecture is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models.blocks import find_blocks
from peftkit.quantize.low_rank_fit import Factors, factors
from peftkit.quantize.nf4_rounding import aimed, requantize

Batch = dict[str, Tensor]
Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[nn.Module, Batch], Tensor]
ALTERNATIONS = 2
"""Times that weights are rounded anew under the factors, and these fitted anew (LoftQ alternates 1 to 5 times)."""
SCALE = 1e6
"""Tokens' weights are tiny: times this, which changes nothing else, their sums stay well within fp32's range."""


@dataclass
class _Row:
    """What one row brings to the blocks."""

    stream: Tensor
    """What the next block reads once those before it are quantized, [1, tokens, width]."""
    exact: Tensor
    """What it reads in the unquantized model."""
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """The other arguments of each block: masks, rotations."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """How much each token counts for a layer, [tokens]; all alike where a layer has none."""


class _Reached(Exception):
    """The layer that is looked at was reached; what comes after it need not run."""


def quantize_blocks(
    whole: nn.Module, packed: nn.Module, batches: Sequence[Batch], forward: Forward, loss: Loss | None = None,
    block_size: int = 64, ranks: Mapping[str, int] | None = None,
    advance: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Factors]:  # fmt: skip
    """Quantizes the linear layers within the blocks of ``packed`` anew.

    Args:
        whole: the model before it was quantized. Its blocks are left with what the quantized ones hold, the factors'
            products added.
        packed: the same model with bitsandbytes' NF4 layers.
        batches: rows to calibrate on, without padding.
        forward: has a model read a batch.
        loss: of a batch, in training; None counts all tokens alike.
        block_size: weights that share a scale.
        ranks: of the factors that make up for what a layer loses, by its name; none for layers that are not named.
        advance: told 1 after each block.

    Returns:
        The factors A and B of every layer that was quantized, by its name; those of rank 0 are empty.

    Raises:
        ModelError: there are no blocks, or something happens to what one block makes before the next one reads it.
    """
    name, blocks = find_blocks(whole)
    twins = packed.get_submodule(name)
    weights = [_weights(whole, _quantized(twins), name, batch, loss) if loss else {} for batch in batches]
    with torch.no_grad():
        rows = [_captured(blocks, lambda batch=batch: forward(whole, batch)) for batch in batches]  # type: ignore[misc]
        for row, own in zip(rows, weights):
            row.weights = own
        starts: dict[str, Factors] = {}
        for number, block in enumerate(blocks):
            exact, twin, inside = copy.deepcopy(block), twins.get_submodule(str(number)), f"{name}.{number}."
            named = {key.removeprefix(inside): rank for key, rank in (ranks or {}).items() if key.startswith(inside)}
            found = _calibrate_block(block, exact, twin, rows, number, block_size, named)
            starts |= {f"{inside}{key}": both for key, both in found.items()}
            for row in rows:
                row.stream, row.exact = (
                    _through(block, row.stream, row, number),
                    _through(exact, row.exact, row, number),
                )
            advance(1)
    return starts


def _weights(whole: Any, layers: Sequence[str], blocks: str, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """Of each layer within the blocks, the mean square of the loss's gradient at what it makes of each token."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
            found[name] = gradients[0].float().square().mean(-1).reshape(-1) * SCALE

        return hook

    whole.requires_grad_(False)
    handles = [whole.get_submodule(f"{blocks}.{name}").register_full_backward_hook(keeper(name)) for name in layers]
    # gradients must reach the first block, and no weight
    handles.append(whole.get_input_embeddings().register_forward_hook(lambda _, __, made: made.requires_grad_(True)))
    try:
        with torch.enable_grad():
            loss(whole, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _quantized(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if type(inner).__name__ == "Linear4bit"]


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
    return _Row(streams[0], streams[0], others)


def _calibrate_block(
    block: nn.Module, exact: nn.Module, twin: nn.Module, rows: Sequence[_Row], number: int, block_size: int,
    ranks: Mapping[str, int],
) -> dict[str, Factors]:  # fmt: skip
    starts: dict[str, Factors] = {}
    for names in _groups(block, twin, rows[0], number):
        gram, cross = _inputs_of(names, block, exact, rows, number)
        originals = [block.get_submodule(name) for name in names]
        wanted = [aimed(_matrix(original).float(), gram, cross) for original in originals]
        layers, own = [twin.get_submodule(name) for name in names], [ranks.get(name, 0) for name in names]
        held, found = _rounded(layers, wanted, gram, block_size, own)
        for name, original, weight, (a, b) in zip(names, originals, held, found):
            _matrix(original).copy_(weight + b @ a)
            starts[name] = (a, b)
    return starts


def _rounded(
    layers: Sequence[Any], wanted: Sequence[Tensor], gram: Tensor, block_size: int, ranks: Sequence[int]
) -> tuple[list[Tensor], list[Factors]]:
    """What layers then hold, and the factors that make up for the rest of what is wanted."""
    held = requantize(layers, wanted, gram, block_size)
    found = [factors(one - now, gram, rank) for one, now, rank in zip(wanted, held, ranks)]
    for _ in range(ALTERNATIONS if any(ranks) else 0):
        held = requantize(layers, [one - b @ a for one, (a, b) in zip(wanted, found)], gram, block_size)
        found = [factors(one - now, gram, rank) for one, now, rank in zip(wanted, held, ranks)]
    return held, found


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

    handles = [block.get_submodule(name).register_forward_pre_hook(reader(name)) for name in _quantized(twin)]
    try:
        _through(block, row.stream, row, number)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in read]


def _inputs_of(
    names: Sequence[str], block: nn.Module, exact: nn.Module, rows: Sequence[_Row], number: int
) -> tuple[Tensor, Tensor]:
    """Σ x̂ᵀx̂ and Σ xᵀx̂ over what layers read, x in the unquantized model and x̂ in this one; [in, in] in fp32."""
    gram = cross = torch.zeros(0)
    for row in rows:
        now = _input_of(block, names[0], row.stream, row, number)
        before = _input_of(exact, names[0], row.exact, row, number)
        if not len(gram):
            gram, cross = (now.new_zeros(now.shape[1], now.shape[1]) for _ in range(2))
        weights = [row.weights[key] for name in names if (key := f"{number}.{name}") in row.weights]
        weighted = now * torch.stack(weights).sum(0)[:, None] if weights else now
        gram.addmm_(now.T, weighted)
        cross.addmm_(before.T, weighted)
    return gram, cross


def _input_of(block: nn.Module, name: str, stream: Tensor, row: _Row, number: int) -> Tensor:
    """What a layer of a block reads of a row, [tokens, in] in fp32."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        _through(block, stream, row, number)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{name} was called a moment ago, and is not any more")


def _through(block: nn.Module, stream: Tensor, row: _Row, number: int) -> Tensor:
    args, kwargs = row.others[number]
    return _first(block(stream, *args, **kwargs))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _matrix(layer: Any) -> Tensor:
    """The weight as a view of [out, in]; Conv1D keeps it the other way."""
    weight: Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T
