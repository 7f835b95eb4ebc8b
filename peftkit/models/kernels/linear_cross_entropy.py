"""A language model's cross-entropy without its logits: only scored positions reach the output layer, in chunks.

    loss = − Σ_t log softmax(f(W h_t + b))[target_t],   t: scored tokens

A causal model predicts at position t the label of position t + 1, a masked one (``next_token=False``) its own.

f is the architecture's scaling and soft-capping of logits. The model runs unchanged except for the forward of its
output layer. That is replaced by a function that takes the hidden states [rows, tokens, width], selects the scored
ones, and computes loss *and gradient* chunk by chunk, so that [tokens, vocabulary] is never allocated (compare Wijmans
et al. 2024, arXiv:2411.09009). On a CPU the softmax of a chunk runs in slices that fit its caches. f is read from the
config and verified with artificial logits; if it stays unknown, the model's full logits are used, with a warning.

Shape suffixes: S scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, product
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkit.models import packing
from peftkit.models.blocks import unwrap
from peftkit.models.patching import replaced_forward
from peftkit.models.pooled_logits import model_inputs

IGNORE = -100
CHUNK_BYTES = 32 * 2**20  # bound on a chunk of logits on a CPU, where one is alive at a time
GPU_CHUNK_BYTES = 128 * 2**20
"""The same on a GPU, where nearly three are alive in fp32. As fast as the whole logits at once, within a tenth; chunks
of 32 MiB take 2.5 times as long (benchmarks/gpu/loss_kernels.py)."""
SLICE_BYTES = 4 * 2**20  # bound on an fp32 slice of a chunk on a CPU; two are alive at a time
SIMULATE_GPU: ContextVar[bool] = ContextVar("SIMULATE_GPU", default=False)
"""Set while planning traces a GPU's pass on a CPU: a chunk is one slice then."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shaping:
    """An architecture's function of the output layer's result z: ``cap · tanh(scale · z / cap)``, or ``scale · z``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer with its original ``forward``, and the shaping of its logits."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    shaping: Shaping
    vocabulary: int

    def rows(self, device: torch.device, itemsize: int = 4) -> int:
        """Rows of logits in a chunk: on a CPU at ``itemsize`` bytes per number, on a GPU in fp32."""
        if device.type == "cpu" and not SIMULATE_GPU.get():
            return max(1, CHUNK_BYTES // (itemsize * self.vocabulary))
        return max(1, GPU_CHUNK_BYTES // (4 * self.vocabulary))

    def __call__(self, hidden_SH: Tensor) -> Tensor:
        """Shaped logits in the dtype of the softmax, [S, V]."""
        return self.shaping(_wide(self.forward(hidden_SH)))


_SHAPING: WeakKeyDictionary[nn.Module, Shaping | None] = WeakKeyDictionary()


def loss(model: Any, batch: dict[str, Tensor], *, next_token: bool = True) -> Tensor:
    """The cross-entropy summed over the batch's scored tokens: a scalar in fp32 (fp64 for a model in fp64).

    Args:
        model: a language model of transformers, bare or wrapped by peft or for distribution.
        batch: ``input_ids`` and ``labels`` [rows, tokens] (-100 is not scored), and the model's other inputs. Where
            ``position_ids`` restart at 0, documents are isolated and the first token of a document is not scored.
        next_token: whether position t predicts label t + 1, as in a causal model; else label t, as in a masked one.
    """
    targets_S, keep = _scored(batch, next_token)
    if _shaping(model, batch["input_ids"]) is None:
        return F.cross_entropy(_wide(_full_logits(model, batch, keep, next_token)), targets_S, reduction="sum")
    return _at_output(model, batch, keep, lambda hidden_SH, output: _sum(hidden_SH, targets_S, output), next_token)


def token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every scored token, with its gradient, and the row that each belongs to.

    For losses that weigh rows by what the model gives their tokens: the gradient of a token's loss by its hidden state
    is computed chunk by chunk as in ``loss``, and scaled in the backward pass by what the row's loss asks for.

    Returns:
        [S] in the dtype of the softmax, and [S] int64; row by row, in each from left to right.
    """
    targets_S, keep = _scored(batch)
    rows_S = keep // (batch["labels"].shape[1] - 1)
    if _shaping(model, batch["input_ids"]) is None:
        return F.cross_entropy(_wide(_full_logits(model, batch, keep)), targets_S, reduction="none"), rows_S
    return _at_output(model, batch, keep, lambda hidden_SH, output: _each(hidden_SH, targets_S, output)), rows_S


def row_outputs(model: Any, batch: dict[str, Tensor], *, next_token: bool = True) -> dict[str, Tensor]:
    """Each row's summed ``loss``, ``weight`` (scored tokens) and ``correct`` (label was the argmax): [rows] fp32."""
    targets_S, keep = _scored(batch, next_token)
    with torch.no_grad():
        if _shaping(model, batch["input_ids"]) is None:
            losses, correct = _token_scores([_full_logits(model, batch, keep, next_token)], targets_S, Shaping())
        else:
            losses, correct = _at_output(
                model, batch, keep, lambda h, output: _chunked_scores(h, targets_S, output), next_token
            )
    count, tokens = batch["labels"].shape
    rows = keep // (tokens - next_token)
    return {
        name: torch.zeros(count, device=rows.device).index_add_(0, rows, values.float())
        for name, values in {"loss": losses, "weight": torch.ones_like(losses), "correct": correct}.items()
    }


@torch.no_grad()
def likeliest(
    model: Any, batch: dict[str, Tensor], count: int, *, next_token: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that the model finds likeliest at every scored position, the likeliest first.

    Returns:
        Their probabilities [S, count], their ids [S, count], and the row of each position [S].
    """

    def best(chunks: Iterable[Tensor], shaping: Shaping) -> tuple[Tensor, Tensor]:
        top = [shaping(_wide(chunk)).softmax(-1).topk(count) for chunk in chunks]
        return torch.cat([one.values for one in top]), torch.cat([one.indices for one in top])

    def at_output(hidden_SH: Tensor, output: OutputLayer) -> tuple[Tensor, Tensor]:
        chunks = hidden_SH.split(output.rows(hidden_SH.device))
        return best((output.forward(hidden) for hidden in chunks), output.shaping)

    _, keep = _scored(batch, next_token)
    if _shaping(model, batch["input_ids"]) is None:
        values, ids = best([_full_logits(model, batch, keep, next_token)], Shaping())
    else:
        values, ids = _at_output(model, batch, keep, at_output, next_token)
    return values, ids, keep // (batch["labels"].shape[1] - next_token)


def scored(batch: dict[str, Tensor]) -> Tensor:
    """The label that each position predicts, [rows, tokens - 1]; -100 where nothing is scored."""
    targets = batch["labels"][:, 1:]
    positions = batch.get("position_ids")
    return targets if positions is None else targets.masked_fill(positions[:, 1:] == 0, IGNORE)


def _scored(batch: dict[str, Tensor], next_token: bool = True) -> tuple[Tensor, Tensor]:
    """Labels of the scored positions, and their indices among all rows' predicting positions: [S], [S].

    Of a causal model, these are all positions but the last.
    """
    targets = scored(batch).flatten() if next_token else batch["labels"].flatten()
    keep = (targets != IGNORE).nonzero().squeeze(1)
    return targets[keep], keep


def assume_declared_shaping(model: Any) -> None:
    """Skips the verification of the shaping that the model's config declares."""
    base = unwrap(model)
    _SHAPING[base] = _declared(base.config.get_text_config())[-1]


def _arguments(model: Any, batch: dict[str, Tensor], next_token: bool) -> dict[str, Any]:
    """Those of the model's ``forward``; one that reads in both directions needs the mask of its padding."""
    return packing.inputs(batch, model) | packing.no_cache(model) if next_token else model_inputs(model, batch)


def _at_output(
    model: Any, batch: dict[str, Tensor], keep: Tensor, compute: Callable[..., Any], next_token: bool = True
) -> Any:
    """Runs the model with ``compute(scored hidden states, output layer)`` as its output layer's ``forward``."""
    base, results = unwrap(model), []
    module = base.get_output_embeddings()
    output = OutputLayer(module, module.forward, _SHAPING[base] or Shaping(), base.config.get_text_config().vocab_size)
    tokens = batch["labels"].shape[1]
    arguments = _arguments(model, batch, next_token)  # may run trials, which need the output layer

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        own = hidden[:, -tokens:]  # without the vectors of a learned prompt
        results.append(compute(own[:, : tokens - next_token].flatten(0, 1).index_select(0, keep), output))
        # nothing that a bias as wide as the vocabulary, which BART adds to what this returns, could make large
        return hidden[:, :0, :1] if "decoder_input_ids" in arguments else hidden[..., :1]

    with replaced_forward({module: forward}):
        model(**arguments)
    return results[0]


def _full_logits(model: Any, batch: dict[str, Tensor], keep: Tensor, next_token: bool = True) -> Tensor:
    """[S, V]; above a masked language model's backbone, only the scored positions are computed."""
    tokens, arguments = batch["labels"].shape[1], _arguments(model, batch, next_token)
    if next_token:
        logits: Tensor = model(**arguments).logits[:, -tokens:]
        return logits[:, :-1].flatten(0, 1).index_select(0, keep)

    def select(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, keep)[None]
        return output

    with unwrap(model).base_model.register_forward_hook(select):
        return model(**arguments).logits[0]  # type: ignore[no-any-return]


def _sum(hidden_SH: Tensor, targets_S: Tensor, output: OutputLayer) -> Tensor:
    """Summed cross-entropy, by the fastest way that the output layer allows."""
    if not torch.is_grad_enabled():
        return _chunked_scores(hidden_SH, targets_S, output)[0].sum()
    if (frozen := _frozen_matrix(hidden_SH, output)) is None:
        trained = _trained(output)
        return _AnyOutputLayer.apply(hidden_SH, targets_S, output, *trained)  # type: ignore[no-any-return]
    return _FrozenMatrix.apply(hidden_SH, *frozen, targets_S, output)  # type: ignore[no-any-return]


def _each(hidden_SH: Tensor, targets_S: Tensor, output: OutputLayer) -> Tensor:
    """The cross-entropy of every scored token, [S], by the fastest way that the output layer allows."""
    if not torch.is_grad_enabled():
        return _chunked_scores(hidden_SH, targets_S, output)[0]
    if (frozen := _frozen_matrix(hidden_SH, output)) is None:
        return torch.cat([hidden_SH.new_zeros(0, dtype=_wide(hidden_SH[:0]).dtype), *(
            checkpoint(_any_chunk, hidden, targets, output, use_reentrant=False)
            for hidden, targets in zip(*(one.split(output.rows(hidden_SH.device)) for one in (hidden_SH, targets_S)))
        )])  # fmt: skip
    return _FrozenMatrixEach.apply(hidden_SH, *frozen, targets_S, output)  # type: ignore[no-any-return]


def _any_chunk(hidden: Tensor, targets: Tensor, output: OutputLayer) -> Tensor:
    return F.cross_entropy(output(hidden), targets, reduction="none")


def _trained(output: OutputLayer) -> list[nn.Parameter]:
    return [parameter for parameter in output.module.parameters() if parameter.requires_grad]


def _frozen_matrix(hidden_SH: Tensor, output: OutputLayer) -> tuple[Tensor, Tensor | None] | None:
    """Weight, in the dtype of the matmul, and bias of an output layer that can be used directly; else None."""
    # no adapter around it, not quantized, not offloaded
    plain = type(output.module) is nn.Linear and output.module.weight.is_floating_point()
    if _trained(output) or not plain or hasattr(output.module, "_hf_hook"):
        return None
    weight: Tensor = output.module.weight  # type: ignore[assignment]
    bias, device, dtype = output.module.bias, hidden_SH.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return weight.to(dtype), bias  # type: ignore[return-value]


def _wide(logits: Tensor) -> Tensor:
    """Logits in the dtype of the softmax: fp32, or fp64 if the model is in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _slices(logits_SV: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are converted to the dtype of the softmax together."""
    unsliced = logits_SV.device.type != "cpu" or SIMULATE_GPU.get()
    rows = max(1, len(logits_SV) if unsliced else SLICE_BYTES // (4 * logits_SV.shape[1]))
    for start in range(0, len(logits_SV), rows):
        yield slice(start, min(start + rows, len(logits_SV)))


def _chunked_scores(hidden_SH: Tensor, targets_S: Tensor, output: OutputLayer) -> tuple[Tensor, Tensor]:
    """``_token_scores`` of an output layer's logits, computed in chunks."""
    rows = output.rows(hidden_SH.device, 2)
    return _token_scores((output.forward(hidden) for hidden in hidden_SH.split(rows)), targets_S, output.shaping)


def _token_scores(chunks: Iterable[Tensor], targets_S: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """Each scored token's negative log-likelihood, and whether its label is the argmax: [S], [S]."""
    losses = [torch.zeros(0, device=targets_S.device)]
    correct = [targets_S.new_zeros(0, dtype=torch.bool)]
    start = 0
    for chunk in chunks:
        for part in _slices(chunk):
            logits, target = shaping(_wide(chunk[part])), targets_S[start + part.start : start + part.stop]
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            correct.append(logits.argmax(-1) == target)
        start += len(chunk)
    return torch.cat(losses), torch.cat(correct)


class _FrozenMatrix(torch.autograd.Function):
    """Summed cross-entropy with a frozen matrix; the gradient of its input is computed in the forward pass.

    d/dh = scale · (softmax − onehot) · (1 − tanh²) W, so that nothing as wide as the vocabulary outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_S: Tensor, output: OutputLayer
    ) -> Tensor:
        total = hidden_SH.new_zeros((), dtype=_wide(weight_VH[:0]).dtype)
        for losses in _frozen_chunks(ctx, hidden_SH, weight_VH, bias_V, targets_S, output):
            total += losses
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grad_output.to(grad_SH.dtype), None, None, None, None


class _FrozenMatrixEach(torch.autograd.Function):
    """``_FrozenMatrix`` for the loss of every token: a token's loss depends on its own hidden state alone, so that the
    gradient that the forward pass computed only needs a factor for each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_S: Tensor, output: OutputLayer
    ) -> Tensor:
        each_S = hidden_SH.new_empty(len(targets_S), dtype=_wide(weight_VH[:0]).dtype)
        for _ in _frozen_chunks(ctx, hidden_SH, weight_VH, bias_V, targets_S, output, each_S):
            pass
        return each_S

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grad_output[:, None].to(grad_SH.dtype), None, None, None, None


def _frozen_chunks(
    ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_S: Tensor, output: OutputLayer,
    each_S: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The summed loss of every chunk; saves the gradient by the hidden states, fills ``each_S`` with each loss."""
    needs_grad = ctx.needs_input_grad[0]
    grad_SH = torch.empty_like(hidden_SH) if needs_grad else None
    rows = min(max(1, len(targets_S)), output.rows(hidden_SH.device, weight_VH.itemsize))
    # one buffer for all chunks: allocating 32 MB from the system takes as long as a softmax
    logits_SV = weight_VH.new_empty((rows, len(weight_VH)))
    with torch.autocast(hidden_SH.device.type, enabled=False):
        for hidden, targets, start in zip(hidden_SH.split(rows), targets_S.split(rows), count(0, rows)):
            chunk = logits_SV[: len(targets)]
            torch.mm(hidden.to(weight_VH.dtype), weight_VH.T, out=chunk)
            each = None if each_S is None else each_S[start : start + rows]
            yield _loss_and_grad(chunk, bias_V, targets, output.shaping, needs_grad, each)
            if grad_SH is not None:
                grad_SH[start : start + rows] = chunk @ weight_VH
    ctx.save_for_backward(grad_SH)


def _loss_and_grad(
    chunk: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping, needs_grad: bool, each: Tensor | None = None
) -> Tensor:
    """Summed loss of a chunk of unshaped logits, which are overwritten by their gradient if ``needs_grad``.

    ``each`` is filled with the loss of every token.
    """
    total = chunk.new_zeros((), dtype=_wide(chunk[:0]).dtype)
    for part in _slices(chunk):
        logits, column, derivative = _wide(chunk[part]), targets[part][:, None], None
        if bias is not None:
            logits = logits + bias
        if shaping.scale != 1.0:
            logits = logits * shaping.scale
        if shaping.cap is not None:
            logits = (logits / shaping.cap).tanh_()
            derivative = (1 - logits**2).mul_(shaping.scale) if needs_grad else None
            logits *= shaping.cap
        grad = logits.softmax(-1)
        # logsumexp from the softmax's largest entry, which is never small: saves a pass over the slice
        normalizer = logits.amax(-1, keepdim=True) - grad.amax(-1, keepdim=True).log()
        losses = normalizer - logits.gather(1, column)
        total += losses.sum()
        if each is not None:
            each[part] = losses.squeeze(1)
        if needs_grad:
            grad.scatter_add_(1, column, grad.new_full(column.shape, -1.0))
            if derivative is not None:
                grad *= derivative
            elif shaping.scale != 1.0:
                grad *= shaping.scale
            chunk[part] = grad
    return total


class _AnyOutputLayer(torch.autograd.Function):
    """Summed cross-entropy with any output layer, trained ones too; each chunk is differentiated before the next."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, targets_S: Tensor, output: OutputLayer, *trained: Tensor) -> Tensor:
        total = hidden_SH.new_zeros((), dtype=_wide(hidden_SH).dtype)
        grads: list[Tensor | None] = [torch.zeros_like(hidden_SH), *(None for _ in trained)]
        start, rows = 0, output.rows(hidden_SH.device)
        for hidden, target in zip(hidden_SH.split(rows), targets_S.split(rows)):
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                # a view, because FLOP counters and similar modes cannot hook a leaf inside grad()
                value = F.cross_entropy(output(leaf.view_as(leaf)), target, reduction="sum")
            first, *rest = torch.autograd.grad(value, [leaf, *trained], allow_unused=True)
            total += value.detach()
            grads[0][start : start + len(target)] = first  # type: ignore[index]
            grads[1:] = [
                new if old is None else old if new is None else old.add_(new) for old, new in zip(grads[1:], rest)
            ]
            start += len(target)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        first, *rest = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return first, None, None, *rest


def _shaping(model: Any, input_ids: Tensor) -> Shaping | None:
    base = unwrap(model)
    if base not in _SHAPING:
        _SHAPING[base] = _find_shaping(model, base, input_ids[:1, :4])
        if _SHAPING[base] is None:
            log.warning(
                "%s computes its logits in a way unknown to peftkit: not in chunks, which takes more memory",
                base.config.model_type,
            )
    return _SHAPING[base]


def _find_shaping(model: Any, base: Any, input_ids: Tensor) -> Shaping | None:
    """The declared shaping that maps artificial outputs, spread widely enough, to the model's logits."""
    module = base.get_output_embeddings()
    if module is None:
        return None
    outputs: list[Tensor] = []

    def replace(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        line = torch.linspace(-60, 60, output.numel(), device=output.device)
        outputs.append(line.roll(output.shape[-1] // 2).view(output.shape).to(output.dtype))
        return outputs[-1]

    inputs = {"input_ids": input_ids}
    if getattr(base.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = input_ids
    with module.register_forward_hook(replace), packing.eval_modules(model), torch.no_grad():
        logits = model(**inputs, **packing.no_cache(model)).logits
    if len(outputs) != 1 or outputs[0].dim() != 3 or outputs[0].shape != logits.shape:
        return None
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    for shaping in _declared(base.config.get_text_config()):
        if (shaping(outputs[0].float()) - logits.float()).abs().max() <= tolerance * logits.float().abs().max():
            return shaping
    return None


def _declared(config: Any) -> list[Shaping]:
    """Combinations of the logit scales and caps that configs declare under various names."""
    scales = [1.0, *(float(getattr(config, name, None) or 1) for name in ("logit_scale", "lm_head_multiplier"))]
    scales.append(1 / float(getattr(config, "logits_scaling", None) or 1))
    caps = [None, *(getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))]
    combinations = product(dict.fromkeys(scales), dict.fromkeys(caps))
    return [Shaping(scale, float(cap) if cap else None) for scale, cap in combinations]
