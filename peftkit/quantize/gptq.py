"""GPTQ over the blocks of a model, one after the other; see ``nf4_rounding`` for a single group of layers.

Each block is calibrated on the outputs of the quantized blocks before it, and so is each layer within a block. The
target is a layer's output in the unquantized model, so that rounding also compensates for earlier errors (asymmetric
calibration: GPTAQ, Li et al. 2025, arXiv:2504.02692). Tokens are weighted by the gradient of the training loss at the
layer's output (GuidedQuant, Kim et al. 2025, arXiv:2505.07004). Rows run one at a time, and only the next block's input
is stored of each. No architecture is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models.blocks import find_blocks
from peftkit.quantize.low_rank_fit import Factors, fit_factors
from peftkit.quantize.nf4_rounding import asymmetric_target, requantize
from peftkit.schema.types import Batch

Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[nn.Module, Batch], Tensor]
ALTERNATIONS = 2
"""Times that weights are requantized given the factors, and these refitted (LoftQ alternates 1 to 5 times)."""
GRADIENT_SCALE = 1e6
"""Squared gradients are tiny; this factor, which has no other effect, keeps their sums well within fp32's range."""


@dataclass
class _Row:
    """The state of one calibration row between blocks."""

    hidden: Tensor  # input of the next block in the quantized model, [1, tokens, width]
    reference: Tensor  # its input in the unquantized model
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """The other arguments of each block: masks, rotary embeddings."""
    weights: dict[str, Tensor]  # weight of each token for a layer, [tokens]; equal for layers that are not listed


class _StopForward(Exception):
    """Ends a forward pass once the input of the layer in question is known."""


def quantize_blocks(
    reference: nn.Module, quantized: nn.Module, batches: Sequence[Batch], forward: Forward, loss: Loss | None = None,
    block_size: int = 64, ranks: Mapping[str, int] | None = None,
    advance: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Factors]:  # fmt: skip
    """Requantizes the linear layers in the blocks of ``quantized`` with GPTQ.

    Args:
        reference: the unquantized model. Afterwards its blocks have the quantized weights plus the low-rank factors.
        quantized: the same model with bitsandbytes' NF4 layers; changed in place.
        batches: calibration rows, without padding.
        forward: runs a model on a batch.
        loss: the training loss of a batch, which weights tokens; None weights all equally.
        block_size: weights per quantization scale.
        ranks: ranks of the factors that correct a layer's quantization error, by its name; 0 for the other layers.
        advance: called with 1 after each block.

    Returns:
        The factors A and B of every quantized layer, by its name; those of rank 0 are empty.

    Raises:
        ModelError: there are no blocks, or a block's input is not the output of the block before it.
    """
    ranks = ranks or {}
    name, blocks = find_blocks(reference)
    quantized_blocks = quantized.get_submodule(name)
    layers = _quantized_layers(quantized_blocks)
    weights = [_token_weights(reference, layers, name, batch, loss) if loss else {} for batch in batches]
    with torch.no_grad():
        rows = [_capture(blocks, partial(forward, reference, batch), each) for batch, each in zip(batches, weights)]
        factors: dict[str, Factors] = {}
        for number, block in enumerate(blocks):
            unquantized, quantized_block = copy.deepcopy(block), quantized_blocks.get_submodule(str(number))
            for names in _group_by_input(block, quantized_block, rows[0], number):
                group_ranks = [ranks.get(f"{name}.{number}.{layer}", 0) for layer in names]
                pairs = _calibrate(names, block, unquantized, quantized_block, rows, number, block_size, group_ranks)
                factors |= {f"{name}.{number}.{layer}": pair for layer, pair in zip(names, pairs)}
            for row in rows:
                row.hidden = _run_block(block, row.hidden, row, number)
                row.reference = _run_block(unquantized, row.reference, row, number)
            advance(1)
    return factors


def _token_weights(model: Any, layers: Sequence[str], blocks: str, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """For each layer in the blocks, the mean squared gradient of the loss at its output of each token."""
    weights: dict[str, Tensor] = {}

    def save_weight(name: str, _: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
        weights[name] = gradients[0].float().square().mean(-1).reshape(-1) * GRADIENT_SCALE

    model.requires_grad_(False)
    with ExitStack() as hooks, torch.enable_grad():
        for name in layers:
            layer = model.get_submodule(f"{blocks}.{name}")
            hooks.enter_context(layer.register_full_backward_hook(partial(save_weight, name)))
        # gradients must reach the first block, but no weight
        embeddings = model.get_input_embeddings()
        hooks.enter_context(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
        loss(model, batch).backward()
    return weights


def _quantized_layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if type(layer).__name__ == "Linear4bit"]


def _capture(blocks: nn.ModuleList, run: Callable[[], Any], weights: dict[str, Tensor]) -> _Row:
    """Runs the model on a row, and records the first block's input and every block's other arguments."""
    inputs: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        others = dict(kwargs)
        inputs.append(args[0] if args else others.pop("hidden_states"))
        arguments.append((args[1:], others))
        outputs.append(_hidden_states(output))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(hook, with_kwargs=True))
        run()
    if len(inputs) != len(blocks) or not all(map(torch.equal, outputs, inputs[1:])):
        raise ModelError(
            "calibration runs block by block, and in this model a block's input is not just the output of the block "
            "before it; use quantization.kind=nf4, which needs no calibration"
        )
    return _Row(inputs[0], inputs[0], arguments, weights)


def _calibrate(
    names: Sequence[str], block: nn.Module, unquantized: nn.Module, quantized: nn.Module, rows: Sequence[_Row],
    number: int, block_size: int, ranks: Sequence[int],
) -> list[Factors]:  # fmt: skip
    """Quantizes layers of a block that read the same input, and copies the results into ``block``."""
    gram, cross = _input_moments(names, block, unquantized, rows, number)
    matrices = [_matrix(block.get_submodule(name)) for name in names]
    targets = [asymmetric_target(matrix.float(), gram, cross) for matrix in matrices]
    layers = [quantized.get_submodule(name) for name in names]
    weights = requantize(layers, targets, gram, block_size)
    factors = [fit_factors(target - weight, gram, rank) for target, weight, rank in zip(targets, weights, ranks)]
    for _ in range(ALTERNATIONS if any(ranks) else 0):
        weights = requantize(layers, [target - b @ a for target, (a, b) in zip(targets, factors)], gram, block_size)
        factors = [fit_factors(target - weight, gram, rank) for target, weight, rank in zip(targets, weights, ranks)]
    for matrix, weight, (a, b) in zip(matrices, weights, factors):
        matrix.copy_(weight + b @ a)
    return factors


def _group_by_input(block: nn.Module, quantized: nn.Module, row: _Row, number: int) -> list[list[str]]:
    """Names of a block's quantized layers in the order in which they run; those that read one tensor share a group."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}

    def add_to_group(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        groups.setdefault(id(args[0]), (args[0], []))[1].append(name)  # a tensor that is kept alive keeps its id

    with ExitStack() as hooks:
        for name in _quantized_layers(quantized):
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(partial(add_to_group, name)))
        _run_block(block, row.hidden, row, number)
    return [names for _, names in groups.values()]


def _input_moments(
    names: Sequence[str], block: nn.Module, unquantized: nn.Module, rows: Sequence[_Row], number: int
) -> tuple[Tensor, Tensor]:
    """Σ x̂ᵀx̂ and Σ xᵀx̂ of layers' inputs x (unquantized model) and x̂ (quantized one), both [in, in] in fp32."""
    weight = _matrix(block.get_submodule(names[0]))
    gram, cross = (weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32) for _ in range(2))
    for row in rows:
        inputs = _layer_input(block, names[0], row.hidden, row, number)
        reference = _layer_input(unquantized, names[0], row.reference, row, number)
        weights = [row.weights[key] for name in names if (key := f"{number}.{name}") in row.weights]
        weighted = inputs * torch.stack(weights).sum(0)[:, None] if weights else inputs
        gram.addmm_(inputs.T, weighted)
        cross.addmm_(reference.T, weighted)
    return gram, cross


def _layer_input(block: nn.Module, name: str, hidden: Tensor, row: _Row, number: int) -> Tensor:
    """The input of a block's layer for a row, [tokens, in] in fp32."""
    inputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise _StopForward

    with block.get_submodule(name).register_forward_pre_hook(hook), suppress(_StopForward):
        _run_block(block, hidden, row, number)
    return inputs[0]


def _run_block(block: nn.Module, hidden: Tensor, row: _Row, number: int) -> Tensor:
    args, kwargs = row.arguments[number]
    return _hidden_states(block(hidden, *args, **kwargs))


def _hidden_states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _matrix(layer: Any) -> Tensor:
    """The weight as a view of [out, in]; Conv1D stores it transposed."""
    weight: Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T
