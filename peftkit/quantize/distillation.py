"""Distillation of the unquantized model into the scales and norms of an NF4 model.

Codes stay fixed. Trained are the scales of the blocks' linear layers (EfficientQAT's second phase: Chen et al. 2024,
arXiv:2407.11062), and all norms (norm tweaking: Li et al. 2023, arXiv:2309.02784) and biases of the backbone. The loss
(as in LLM-QAT: Liu et al. 2023, arXiv:2305.17888) is KL(unquantized ‖ quantized) over the scored tokens for language
models, for others the squared error of the last hidden states. Under double quantization the forward pass uses the
quantized scales, and gradients pass straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.models.kernels.linear_cross_entropy import IGNORE, scored
from peftkit.models.packing import eval_modules
from peftkit.models.patching import replaced_forward
from peftkit.quantize.nf4_rounding import get_scales, set_scales, to_blocks
from peftkit.schema.types import Batch

Forward = Callable[[Any, Batch], Tensor]
LEARNING_RATE = 3e-3  # Adam's learning rate relative to a parameter's mean magnitude
WARMUP_STEPS = 10
CHUNK = 256  # tokens whose logits are in memory at a time


def distillation_targets(model: Any, batch: Batch, forward: Forward, causal: bool) -> Tensor:
    """The unquantized model's last hidden states that ``distill`` fits, [tokens, width]."""
    with eval_modules(model), torch.no_grad():
        return forward(model, batch)[_token_mask(batch, causal)]


def distill(
    model: Any, batches: Sequence[Batch], targets: Sequence[Tensor], forward: Forward, causal: bool,
    advance: Callable[[int], None] = lambda batches: None,
) -> None:  # fmt: skip
    """Trains the scales and norms of a quantized model in one pass over the batches, in the order given.

    Args:
        model: has bitsandbytes' NF4 layers, and ``requires_grad`` set nowhere; changed in place.
        batches: rows to train on.
        targets: ``distillation_targets`` of the unquantized model for each batch.
        forward: runs a model on a batch; returns the last hidden states [rows, tokens, width].
        causal: whether the model has a language-model head, which must equal the unquantized model's.
        advance: called with 1 after each batch.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    scales = [nn.Parameter(get_scales(layer.weight.quant_state)) for layer in layers]
    vectors = [weight for weight in model.base_model.parameters() if weight.dim() == 1 and weight.is_floating_point()]
    masters = [nn.Parameter(weight.detach().float().clone()) for weight in vectors]
    groups = [{"params": [values], "size": float(values.detach().abs().mean())} for values in (*scales, *masters)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    gradient = _kl_gradient if causal else _error_gradient
    head = model.get_output_embeddings() if causal else None
    for weight in vectors:
        weight.requires_grad_(True)
    # until bitsandbytes' own forward passes gradients to the scales
    forwards = {layer: partial(_scaled_linear, layer, scale) for layer, scale in zip(layers, scales)}
    with eval_modules(model), replaced_forward(forwards):
        for step, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            with torch.enable_grad():
                hidden = forward(model, batch)[_token_mask(batch, causal)]
            if len(hidden):
                hidden.backward(gradient(hidden.detach(), target, head))
            for weight, master in zip(vectors, masters):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            schedule = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule * group["size"]
            optimizer.step()
            optimizer.zero_grad()
            for weight, master in zip(vectors, masters):
                weight.data.copy_(master.data)
            advance(1)
    for weight in vectors:
        weight.requires_grad_(False)
    for layer, scale in zip(layers, scales):
        set_scales(layer.weight.quant_state, scale.data)


def _token_mask(batch: Batch, causal: bool) -> Tensor:
    """Where hidden states matter, [rows, tokens]: where they predict a scored token, or everywhere but padding."""
    return nn.functional.pad(scored(batch) != IGNORE, (0, 1)) if causal else batch["attention_mask"].bool()


def _kl_gradient(hidden: Tensor, targets: Tensor, head: Any) -> Tensor:
    """The gradient of the mean KL(unquantized ‖ quantized) with respect to ``hidden``, [tokens, width]."""
    gradient = torch.empty_like(hidden)
    for start in range(0, len(hidden), CHUNK):
        student = hidden[start : start + CHUNK].requires_grad_(True)
        with torch.enable_grad():
            log_probs = nn.functional.log_softmax(head(student).float(), -1)
        with torch.no_grad():
            teacher = nn.functional.log_softmax(head(targets[start : start + CHUNK]).float(), -1)
        loss = nn.functional.kl_div(log_probs, teacher, reduction="sum", log_target=True) / len(hidden)
        (gradient[start : start + CHUNK],) = torch.autograd.grad(loss, student)
    return gradient


def _error_gradient(hidden: Tensor, targets: Tensor, head: None) -> Tensor:
    """The gradient of ‖hidden − targets‖² / ‖targets‖² with respect to ``hidden``, [tokens, width]."""
    targets = targets.float()
    return (2 * (hidden.float() - targets) / targets.square().sum()).to(hidden.dtype)


def _scaled_linear(layer: Any, scale: Tensor, x: Tensor) -> Tensor:
    """The forward pass of an NF4 layer with its codes times these scales."""
    y: Tensor = _ScaledMatmul.apply(x, scale, layer.weight)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _ScaledMatmul(torch.autograd.Function):
    """x Wᵀ with W dequantized anew in each pass, and the gradients of x and of W's scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Any) -> Tensor:  # type: ignore[override]
        quantized_scale = set_scales(weight.quant_state, scale)
        ctx.save_for_backward(x, quantized_scale)
        ctx.weight = weight
        return x @ _dequantize(weight, quantized_scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        codes = _dequantize(ctx.weight, torch.ones_like(scale), x.dtype)
        grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
        size = ctx.weight.quant_state.blocksize
        grad_scale = (to_blocks(grad_weight.float(), size) * to_blocks(codes.float(), size)).sum(1)
        grad_x = grad_y @ _dequantize(ctx.weight, scale, x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_scale, None


def _dequantize(weight: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times scales, [out, in]."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = weight.quant_state
    same = {name: getattr(state, name) for name in ("shape", "code", "blocksize", "quant_type")}
    return dequantize_4bit(weight.data, QuantState(scale, dtype=dtype, **same))
