"""Scales and norms of an NF4 model, trained until it says what the whole model says.

Codes stay as they were rounded. What is trained are the scales of the blocks' linear layers (EfficientQAT's second
phase: Chen et al. 2024, arXiv:2407.11062), and all one-dimensional weights of the backbone: norms (norm tweaking: Li et
al. 2023, arXiv:2309.02784) and biases. What is aimed at is the whole model, not the rows' own words (distillation, as
in LLM-QAT: Liu et al. 2023, arXiv:2305.17888): of language models KL(whole ‖ quantized) over the scored tokens, of
others the squared error of the last hidden states. Where scales are quantized themselves, the forward pass has them
rounded and the gradient passes straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.models.kernels.linear_cross_entropy import IGNORE, scored
from peftkit.models.packing import eval_modules
from peftkit.quantize.nf4_rounding import as_blocks, double_quantized, scales_of

Batch = dict[str, Tensor]
Forward = Callable[[Any, Batch], Tensor]
LEARNING_RATE = 3e-3
"""Of Adam, as a share of a parameter's mean size: a step moves a scale by so much at most."""
WARM_UP = 10
CHUNK = 256
"""Tokens whose logits are held at a time."""


def targets(model: Any, batch: Batch, forward: Forward, causal: bool) -> Tensor:
    """What ``tune`` aims at: the last hidden states [tokens, width] of the whole model, where they count."""
    with eval_modules(model), torch.no_grad():
        return forward(model, batch)[_counted(batch, causal)]


def distill(
    packed: Any, batches: Sequence[Batch], wanted: Sequence[Tensor], forward: Forward, causal: bool,
    advance: Callable[[int], None] = lambda batches: None,
) -> None:  # fmt: skip
    """Trains the scales and norms of ``packed`` in one pass over the batches, in the order given.

    Takes no memory for weights beyond the packed ones; one layer's gradient is formed at a time.

    Args:
        packed: a model with bitsandbytes' NF4 layers, no gradients wanted; changed in place.
        batches: rows to learn from.
        wanted: ``targets`` of the whole model on each batch.
        forward: has a model read a batch; gives the last hidden states [rows, tokens, width].
        causal: whether the model has a language-model head, the same one as the whole model.
        advance: told 1 after each batch.
    """
    layers = [module for module in packed.modules() if type(module).__name__ == "Linear4bit"]
    scales = [nn.Parameter(scales_of(layer.weight.quant_state)) for layer in layers]
    flat = [weight for weight in packed.base_model.parameters() if weight.dim() == 1 and weight.is_floating_point()]
    masters = [nn.Parameter(weight.detach().float().clone()) for weight in flat]
    trained = [*scales, *masters]
    optimizer = torch.optim.Adam([{"params": [one], "size": _size(one)} for one in trained], betas=(0.9, 0.95))
    loss = _divergence if causal else _error
    head = packed.get_output_embeddings() if causal else None
    for weight in flat:
        weight.requires_grad_(True)
    with eval_modules(packed), _multiplying_by(layers, scales):
        for step, (batch, target) in enumerate(zip(batches, wanted, strict=True)):
            with torch.enable_grad():
                hidden = forward(packed, batch)[_counted(batch, causal)]
            if len(hidden):
                hidden.backward(loss(hidden.detach(), target, head))
            for weight, master in zip(flat, masters):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            share = min(1.0, (step + 1) / WARM_UP) * (1 - step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share * group["size"]
            optimizer.step()
            optimizer.zero_grad()
            for weight, master in zip(flat, masters):
                weight.data.copy_(master.data)
            advance(1)
    for weight in flat:
        weight.requires_grad_(False)
    for layer, scale in zip(layers, scales):
        double_quantized(layer.weight.quant_state, scale.data)


def _size(values: Tensor) -> float:
    return float(values.detach().abs().mean())


def _counted(batch: Batch, causal: bool) -> Tensor:
    """Where hidden states matter, [rows, tokens]: those that a scored token is read from, or all but padding."""
    if not causal:
        return batch["attention_mask"].bool()
    return nn.functional.pad(scored(batch) != IGNORE, (0, 1))


def _divergence(found: Tensor, wanted: Tensor, head: Any) -> Tensor:
    """The gradient of the mean KL(whole ‖ quantized) by the hidden states ``found``, [tokens, width]."""
    made = torch.empty_like(found)
    for start in range(0, len(found), CHUNK):
        own = found[start : start + CHUNK].requires_grad_(True)
        with torch.enable_grad():
            said = nn.functional.log_softmax(head(own).float(), -1)
        with torch.no_grad():
            right = nn.functional.log_softmax(head(wanted[start : start + CHUNK]).float(), -1)
        loss = nn.functional.kl_div(said, right, reduction="sum", log_target=True) / len(found)
        (made[start : start + CHUNK],) = torch.autograd.grad(loss, own)
    return made


def _error(found: Tensor, wanted: Tensor, head: None) -> Tensor:
    """The gradient of ‖found − wanted‖² / ‖wanted‖² by ``found``, [tokens, width]."""
    wanted = wanted.float()
    return (2 * (found.float() - wanted) / wanted.square().sum()).to(found.dtype)


@contextmanager
def _multiplying_by(layers: Sequence[Any], scales: Sequence[Tensor]) -> Iterator[None]:
    """Inside, layers multiply by their codes times these scales."""

    def product(layer: Any, scale: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(given: Tensor) -> Tensor:
            made: Tensor = _Product.apply(given, scale, layer.weight)
            return made if layer.bias is None else made + layer.bias.to(made.dtype)

        return forward

    for layer, scale in zip(layers, scales):
        layer.forward = product(layer, scale)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Product(torch.autograd.Function):
    """x Wᵀ with W opened anew for each pass, and the gradients of x and of W's scales."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, scale: Tensor, weight: Any) -> Tensor:  # type: ignore[override]
        rounded = double_quantized(weight.quant_state, scale)
        ctx.save_for_backward(given, rounded)
        ctx.weight = weight
        return given @ _opened(weight, rounded, given.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        given, rounded = ctx.saved_tensors
        unit = _opened(ctx.weight, torch.ones_like(rounded), given.dtype)
        by_weight = gradient.flatten(0, -2).T @ given.flatten(0, -2)
        size = ctx.weight.quant_state.blocksize
        by_scale = (as_blocks(by_weight.float(), size) * as_blocks(unit.float(), size)).sum(1)
        by_given = gradient @ _opened(ctx.weight, rounded, given.dtype) if ctx.needs_input_grad[0] else None
        return by_given, by_scale, None


def _opened(weight: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times scales, [out, in]."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    held = weight.quant_state
    state = QuantState(
        scale, shape=held.shape, code=held.code, blocksize=held.blocksize, quant_type=held.quant_type, dtype=dtype
    )
    return dequantize_4bit(weight.data, state)
