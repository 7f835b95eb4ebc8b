"""Class scores of a batch of texts, through the architecture's own pooling or the mean (or first) of the tokens.

Where pooling is "mean" or "cls", the model is a transformers token classifier, with a head that is linear:

    1/n Σ_t (W h_t + b) = W (1/n Σ_t h_t) + b

Plain transformers and peft therefore load such a model completely; their user only adds a masked mean. Here the tokens
are pooled before dropout and head, which gives the same scores in evaluation and is cheaper in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.models.blocks import forward_parameters, unwrap
from peftkit.models.kernels.first_token import reading_first_token
from peftkit.models.packing import no_cache


def logits(model: nn.Module, batch: Mapping[str, Tensor], pooling: str) -> Tensor:
    """Scores [rows, labels] in fp32.

    Args:
        model: a transformers classifier, or a wrapper around one.
        batch: ``input_ids`` and ``attention_mask`` [rows, tokens]; tensors that the model does not take are left out.
        pooling: "own", "mean" or "cls".
    """
    inputs = model_inputs(model, batch)
    if pooling == "own":
        with reading_first_token():
            return model(**inputs).logits.float()
    layer, mask = _pooled_layer(unwrap(model)), batch["attention_mask"]
    if layer is None:
        return pool(model(**inputs).logits, mask, pooling).float()

    def pool_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return (pool(hidden, mask, pooling).to(hidden.dtype), *arguments[1:])

    with layer.register_forward_pre_hook(pool_input):
        return model(**inputs).logits.float()


def plain_logits(model: nn.Module, batch: Mapping[str, Tensor], pooling: str) -> Tensor:
    """The same scores as a user of the model card computes them: the head on every token, then the mean.

    In fp32 this equals ``logits`` up to rounding; in bf16 the head's matmul rounds every token.
    """
    scores = scores_of(model(**model_inputs(model, batch))).float()
    return scores if pooling == "own" else pool(scores, batch["attention_mask"], pooling)


def scores_of(outputs: Any) -> Tensor:
    """The logits of a model's outputs; those of the first and the last token of an answer as [rows, tokens, 2]."""
    start = getattr(outputs, "start_logits", None)
    return outputs.logits if start is None else torch.stack([start, outputs.end_logits], dim=-1)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[rows, tokens, width] → [rows, width]: the mean of the unmasked tokens, or the first ("cls") or last of them."""
    if pooling in ("cls", "last"):
        places = torch.arange(mask.shape[1], device=mask.device)
        one = mask.int().argmax(dim=1) if pooling == "cls" else (places * mask).argmax(dim=1)
        # gather: indexing by row would be traced as a constant
        return hidden.gather(1, one[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
    weights = mask.to(torch.float32).unsqueeze(-1)
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _pooled_layer(model: Any) -> nn.Module | None:
    """The dropout right before a linear head, or that head; None for any other head."""
    top = [child for name, child in model.named_children() if name != model.base_model_prefix]
    # peft wraps a head that is fully trained
    if not top or not isinstance(getattr(top[-1], "original_module", top[-1]), nn.Linear):
        return None
    return top[-2] if len(top) > 1 and isinstance(top[-2], nn.Dropout) else top[-1]


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model's forward takes of a batch, without labels and without a key-value cache."""
    names = forward_parameters(model) - {"labels"}
    return {name: tensor for name, tensor in batch.items() if name in names} | no_cache(model)
