"""Class scores of a batch of texts, through the architecture's own pooling or the mean (or first) of the tokens.

Where pooling is "mean" or "cls", the model is a transformers token classifier. Its logits are linear in the hidden
state, W h_t + b, so that the mean of the tokens' logits is the logits of the mean token:

    1/n Σ_t (W h_t + b) = W (1/n Σ_t h_t) + b

Hence plain transformers and peft load such a model completely, and one masked mean is all that is left to the reader.
Here the tokens are pooled before dropout and head, which is the same in evaluation and cheaper in training.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.models.kernels.first_token import reading_first_token


def logits(model: nn.Module, batch: Mapping[str, Tensor], pooling: str) -> Tensor:
    """Scores [rows, labels] in fp32.

    Args:
        model: a transformers classifier, or peft's (or torch's data-parallel) wrapper around one.
        batch: ``input_ids`` and ``attention_mask`` [rows, tokens], and whatever else; what the model does not take
            is left out.
        pooling: "own", "mean" or "cls".
    """
    inner = unwrap(model)
    inputs = _inputs(inner, batch)
    if pooling == "own":
        with reading_first_token():
            return model(**inputs).logits.float()
    mask = batch["attention_mask"]
    with _pooled_before_head(inner, mask, pooling) as pooled:
        scores = model(**inputs).logits
    return (scores if pooled else pool(scores, mask, pooling)).float()


def plain_logits(model: nn.Module, batch: Mapping[str, Tensor], pooling: str) -> Tensor:
    """The same scores the way a reader of the model card gets them: head on every token first, then the mean.

    In fp32 this equals ``logits`` to rounding; in bf16 the head's products are rounded token by token.
    """
    scores = model(**_inputs(unwrap(model), batch)).logits.float()
    return scores if pooling == "own" else pool(scores, batch["attention_mask"], pooling)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[rows, tokens, width] → [rows, width]: the mean of the unmasked tokens ("mean") or the first of them ("cls")."""
    if pooling == "cls":
        first = mask.int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = mask.to(torch.float32).unsqueeze(-1)
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside the wrappers of peft, DistributedDataParallel and torch.compile."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        else:
            return inner


@contextlib.contextmanager
def _pooled_before_head(model: Any, mask: Tensor, pooling: str) -> Iterator[bool]:
    """Pools what enters dropout and head during one forward; yields False where the head is not one linear layer.

    A hook rather than a call of the parts, so that the model's own forward is what runs, whatever wraps it.
    """
    place = _place(model)
    if place is None:
        yield False
        return

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return (pool(hidden, mask, pooling).to(hidden.dtype), *arguments[1:])

    handle = place.register_forward_pre_hook(enter)
    try:
        yield True
    finally:
        handle.remove()


def _place(model: Any) -> nn.Module | None:
    """The dropout right before the linear head, or that head; None where something else stands on top."""
    top = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    if not top or not _is_linear(top[-1][1]):
        return None
    if len(top) > 1 and isinstance(top[-2][1], nn.Dropout):
        return top[-2][1]
    return top[-1][1]


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or peft's wrapper around one that is trained in full."""
    original = getattr(module, "original_module", module)
    return isinstance(original, nn.Linear)


def _inputs(inner: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model's forward takes of a batch; its loss is not wanted, nor a cache of keys and values."""
    takes = _parameters(inner.__class__)
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name in takes and name != "labels"}
    return inputs | ({"use_cache": False} if "use_cache" in takes else {})


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
