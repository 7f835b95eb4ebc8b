"""The language model's loss without its logits: only scored positions pass through the head, a chunk at a time.

    loss = sum over scored tokens of  -log softmax(f(W h + b))[target]

with f the scaling and soft-capping of the architecture. The model runs as it is, adapters and wrappers included; only
its output embedding is stood in for while it runs, which takes the hidden states [rows, tokens, width], picks the
scored ones, and forms their loss *and its gradient* chunk by chunk, so that tokens × vocabulary is never held. On a
CPU the softmax of a chunk is taken a slice at a time, which its caches hold.
What f is, is read from the config and then tried on made-up logits; where it stays unknown, the model's own
full logits are used, and a warning says so.

Shape suffixes: S scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
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

from peftkit.models import packing

IGNORE = -100
CHUNK_BYTES = 32 * 2**20
"""Bound on one chunk of logits. On a CPU one lives at a time, elsewhere three, in fp32."""
SLICE_BYTES = 4 * 2**20
"""Bound on one fp32 slice of a chunk on a CPU; two live at a time."""
AS_ON_A_GPU: ContextVar[bool] = ContextVar("AS_ON_A_GPU", default=False)
"""Set where a pass on a GPU is worked out on a CPU: a chunk is one slice then."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shaping:
    """What an architecture does to the head's output: ``cap · tanh(scale · z / cap)``, or ``scale · z``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class Head:
    """An output embedding, as it was before it was stood in for, with what follows it."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    shaping: Shaping
    vocabulary: int

    def rows(self, itemsize: int = 4) -> int:
        """Hidden states whose logits, of so many bytes each, stay within ``CHUNK_BYTES``."""
        return max(1, CHUNK_BYTES // (itemsize * self.vocabulary))

    def __call__(self, hidden_SH: Tensor) -> Tensor:
        """Shaped logits in the precision of the softmax, [S, V]."""
        return self.shaping(_wide(self.forward(hidden_SH)))


_SHAPING: WeakKeyDictionary[nn.Module, Shaping | None] = WeakKeyDictionary()


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy summed over the batch's scored tokens: a scalar in fp32 (fp64 for a model in fp64).

    Args:
        model: a causal language model of transformers, bare or wrapped by peft or for distribution.
        batch: ``input_ids`` and ``labels`` [rows, tokens] (position t predicts label t + 1; -100 is not scored), and
            the model's other inputs. With ``position_ids`` that restart at 0, documents are kept apart and the first
            token of a document, which has nothing before it, is not scored.
    """
    targets = scored(batch)
    keep = (targets != IGNORE).flatten().nonzero().squeeze(1)
    shaping = _shaping(model, batch["input_ids"])
    if shaping is None:
        logits_SV = _wide(_full_logits(model, batch, keep))
        return F.cross_entropy(logits_SV, targets.flatten()[keep], reduction="sum")

    return _at_head(model, batch, keep, lambda hidden_SH, head: _summed(hidden_SH, targets.flatten()[keep], head))


def row_outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row's summed ``loss``, ``weight`` (scored tokens) and ``correct`` (label was likeliest): [rows] fp32."""
    targets = scored(batch)
    keep = (targets != IGNORE).flatten().nonzero().squeeze(1)
    wanted = targets.flatten()[keep]
    with torch.no_grad():
        shaping = _shaping(model, batch["input_ids"])
        if shaping is None:
            logits_SV = _full_logits(model, batch, keep)
            figures = _figures([logits_SV], wanted, Shaping())
        else:
            figures = _at_head(model, batch, keep, lambda hidden_SH, head: _scores(hidden_SH, wanted, head))
    rows = keep // targets.shape[1]
    return {
        name: torch.zeros(len(targets), device=rows.device).index_add_(0, rows, values.float())
        for name, values in {"loss": figures[0], "weight": torch.ones_like(figures[0]), "correct": figures[1]}.items()
    }


def scored(batch: dict[str, Tensor]) -> Tensor:
    """The label that each position predicts, [rows, tokens - 1]; -100 where nothing is scored."""
    targets = batch["labels"][:, 1:]
    positions = batch.get("position_ids")
    return targets if positions is None else targets.masked_fill(positions[:, 1:] == 0, IGNORE)


def full_logits_reason(model: Any, input_ids: Tensor) -> str | None:
    """Why the model's whole logits must be formed, or None where they need not."""
    if _shaping(model, input_ids) is not None:
        return None
    name = packing.underlying(model).config.model_type
    return f"{name} changes its logits in a way that is not known here: whole logits are formed, which takes memory"


def _at_head(model: Any, batch: dict[str, Tensor], keep: Tensor, compute: Callable[..., Any]) -> Any:
    """Runs the model with ``compute(scored hidden states, head)`` in place of its head.

    Only ``forward`` of the head is stood in for, not the module: whatever hooks surround its call (sharding,
    offloading) do their work around ours.
    """
    base = packing.underlying(model)
    module, found = base.get_output_embeddings(), []
    head = Head(module, module.forward, _SHAPING[base] or Shaping(), base.config.get_text_config().vocab_size)
    tokens = batch["labels"].shape[1]
    arguments = packing.inputs(batch, model) | packing.no_cache(model)  # may try the model, so before its head is gone

    def stand_in(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        own = hidden[:, -tokens:]  # a learned prompt stands before the row's own tokens
        found.append(compute(own[:, :-1].flatten(0, 1).index_select(0, keep), head))
        return hidden[..., :1]

    shadowed = "forward" in vars(module)
    module.forward = stand_in
    try:
        model(**arguments)
    finally:
        if shadowed:
            module.forward = head.forward
        else:
            del module.forward
    return found[0]


def _full_logits(model: Any, batch: dict[str, Tensor], keep: Tensor) -> Tensor:
    logits = model(**packing.inputs(batch, model), **packing.no_cache(model)).logits[:, -batch["labels"].shape[1] :]
    return logits[:, :-1].flatten(0, 1).index_select(0, keep)


def _summed(hidden_SH: Tensor, targets_S: Tensor, head: Head) -> Tensor:
    if not torch.is_grad_enabled():
        return _scores(hidden_SH, targets_S, head)[0].sum()
    trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
    if trained or not _is_plain(head.module):
        return _AnyHead.apply(hidden_SH, targets_S, head, *trained)  # type: ignore[no-any-return]
    weight: Tensor = head.module.weight  # type: ignore[assignment]
    bias = head.module.bias
    fused = _fused_kernel(hidden_SH.device.type)
    if fused is not None and head.shaping.scale == 1.0 and bias is None and len(targets_S):
        return fused(hidden_SH, weight, targets_S, head.shaping.cap)
    weight_VH = weight.to(_compute_dtype(hidden_SH, weight))
    return _FrozenHead.apply(hidden_SH, weight_VH, bias, targets_S, head)  # type: ignore[no-any-return]


def _wide(logits: Tensor) -> Tensor:
    """Logits in the precision of the softmax: fp32, or fp64 where the model is in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _is_plain(head: nn.Module) -> bool:
    """A matrix whose values can be used directly: no adapter around it, not quantized, not offloaded."""
    return type(head) is nn.Linear and head.weight.is_floating_point() and not hasattr(head, "_hf_hook")


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _slices(logits_SV: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are brought to the precision of the softmax together."""
    whole = logits_SV.device.type != "cpu" or AS_ON_A_GPU.get()
    rows = len(logits_SV) if whole else SLICE_BYTES // (4 * logits_SV.shape[1])
    for start in range(0, len(logits_SV), max(1, rows)):
        yield slice(start, min(start + max(1, rows), len(logits_SV)))


def _scores(hidden_SH: Tensor, targets_S: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """``_figures`` of a head's logits, formed a chunk at a time."""
    rows = head.rows(2 if hidden_SH.device.type == "cpu" else 4)
    return _figures((head.forward(hidden) for hidden in hidden_SH.split(rows)), targets_S, head.shaping)


def _figures(chunks: Iterable[Tensor], targets_S: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, and whether the likeliest token is the label, of each scored token: [S], [S]."""
    losses = [torch.zeros(0, device=targets_S.device)]
    correct = [targets_S.new_zeros(0, dtype=torch.bool)]
    start = 0
    for chunk in chunks:
        for piece in _slices(chunk):
            logits, target = shaping(_wide(chunk[piece])), targets_S[start + piece.start : start + piece.stop]
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            correct.append(logits.argmax(-1) == target)
        start += len(chunk)
    return torch.cat(losses), torch.cat(correct)


class _FrozenHead(torch.autograd.Function):
    """Sum of cross-entropies over a frozen matrix; the gradient of its input is formed in the forward pass.

    d/dh = scale · (softmax − onehot) · (1 − tanh²) W, so that nothing as wide as the vocabulary outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_S: Tensor, head: Head
    ) -> Tensor:
        total = hidden_SH.new_zeros((), dtype=_wide(weight_VH[:0]).dtype)
        wanted = ctx.needs_input_grad[0]
        grad_SH = torch.empty_like(hidden_SH) if wanted else None
        rows = min(max(1, len(targets_S)), head.rows(weight_VH.itemsize if hidden_SH.device.type == "cpu" else 4))
        # one chunk's memory serves all: to take 32 MB anew from the system costs as much as a softmax
        logits_SV = weight_VH.new_empty((rows, len(weight_VH)))
        with torch.autocast(hidden_SH.device.type, enabled=False):
            for hidden, targets, start in zip(hidden_SH.split(rows), targets_S.split(rows), count(0, rows)):
                chunk = logits_SV[: len(targets)]
                torch.mm(hidden.to(weight_VH.dtype), weight_VH.T, out=chunk)
                total += _loss_and_grad(chunk, bias_V, targets, head.shaping, wanted)
                if grad_SH is not None:
                    grad_SH[start : start + rows] = chunk @ weight_VH
        ctx.save_for_backward(grad_SH)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grad_output.to(grad_SH.dtype), None, None, None, None


def _loss_and_grad(chunk: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping, wanted: bool) -> Tensor:
    """Summed loss of a chunk of bare logits, which become its derivative by them if that is wanted."""
    total = chunk.new_zeros((), dtype=_wide(chunk[:0]).dtype)
    for piece in _slices(chunk):
        logits, column, slope = _wide(chunk[piece]), targets[piece][:, None], None
        if bias is not None:
            logits = logits + bias
        if shaping.scale != 1.0:
            logits = logits * shaping.scale
        if shaping.cap is not None:
            logits = (logits / shaping.cap).tanh_()
            slope = (1 - logits**2).mul_(shaping.scale) if wanted else None
            logits *= shaping.cap
        grad = logits.softmax(-1)
        # logsumexp from the softmax's largest entry, which is never small: a pass over the slice less
        normalizer = logits.amax(-1, keepdim=True) - grad.amax(-1, keepdim=True).log()
        total += (normalizer - logits.gather(1, column)).sum()
        if wanted:
            grad.scatter_add_(1, column, grad.new_full(column.shape, -1.0))
            if slope is not None:
                grad *= slope
            elif shaping.scale != 1.0:
                grad *= shaping.scale
            chunk[piece] = grad
    return total


class _AnyHead(torch.autograd.Function):
    """Sum of cross-entropies over any head, trained ones too; a chunk is differentiated before the next is formed."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, targets_S: Tensor, head: Head, *trained: Tensor) -> Tensor:
        total = hidden_SH.new_zeros((), dtype=_wide(hidden_SH).dtype)
        grads: list[Tensor | None] = [torch.zeros_like(hidden_SH), *(None for _ in trained)]
        start = 0
        for hidden, target in zip(hidden_SH.split(head.rows()), targets_S.split(head.rows())):
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                # a view, for what watches modules at work (counting their products) cannot hook a leaf in grad()
                value = F.cross_entropy(head(leaf.view_as(leaf)), target, reduction="sum")
            first, *rest = torch.autograd.grad(value, [leaf, *trained], allow_unused=True)
            total += value.detach()
            grads[0][start : start + len(target)] = first  # type: ignore[index]
            grads[1:] = [_plus(old, new) for old, new in zip(grads[1:], rest)]
            start += len(target)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        first, *rest = scaled
        return first, None, None, *rest


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old if new is None else old.add_(new)


def _fused_kernel(device: str) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None:
    """Cut-cross-entropy (arXiv:2411.09009) or Liger's fused loss (arXiv:2410.10989) on CUDA, where installed."""
    if device != "cuda":
        return None
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, target, cap: linear_cross_entropy(
            hidden.to(weight.dtype), weight, target, softcap=cap, reduction="sum"
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda hidden, weight, target, cap: liger_fused_linear_cross_entropy(
            hidden.to(weight.dtype), weight, target, softcap=cap, reduction="sum"
        )
    return None


def _shaping(model: Any, input_ids: Tensor) -> Shaping | None:
    base = packing.underlying(model)
    if base not in _SHAPING:
        _SHAPING[base] = _find_shaping(model, base, input_ids[:1, :4])
        reason = full_logits_reason(model, input_ids)
        if reason:
            log.warning(reason)
    return _SHAPING[base]


def assume_declared_shaping(model: Any) -> None:
    """Record the shaping that the config of a model without data declares, since it cannot be tried."""
    base = packing.underlying(model)
    _SHAPING[base] = _declared(base.config.get_text_config())[-1]


def _find_shaping(model: Any, base: Any, input_ids: Tensor) -> Shaping | None:
    """The declared shaping that turns made-up head outputs, spread wide enough to tell, into the model's logits."""
    head = base.get_output_embeddings()
    if head is None:
        return None
    made: list[Tensor] = []

    def replace(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        line = torch.linspace(-60, 60, output.numel(), device=output.device)
        made.append(line.roll(output.shape[-1] // 2).view(output.shape).to(output.dtype))
        return made[-1]

    hook = head.register_forward_hook(replace)
    try:
        with packing.eval_modules(model), torch.no_grad():
            logits = model(input_ids=input_ids, **packing.no_cache(model)).logits
    finally:
        hook.remove()
    if len(made) != 1 or made[0].dim() != 3 or made[0].shape != logits.shape:
        return None
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    for shaping in _declared(base.config.get_text_config()):
        if (shaping(made[0].float()) - logits.float()).abs().max() <= tolerance * logits.float().abs().max():
            return shaping
    return None


def _declared(config: Any) -> list[Shaping]:
    """Combinations of the logit scales and caps that configs declare under various names."""
    scales = [1.0]
    scales += [float(getattr(config, name, None) or 1) for name in ("logit_scale", "lm_head_multiplier")]
    scales += [1 / float(getattr(config, name, None) or 1) for name in ("logits_scaling",)]
    caps = [None, *(getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))]
    return [
        Shaping(scale, float(cap) if cap else None)
        for scale, cap in product(dict.fromkeys(scales), dict.fromkeys(caps))
    ]
