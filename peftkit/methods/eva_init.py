"""EVA: LoRA initialized from a few batches of data (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.schema.types import Batch, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

MAX_EPOCHS = 50  # passes over the batches before EVA gives up; it usually converges in two or three


def initialize(loaded: LoadedModel, batches: Sequence[Batch]) -> None:
    """Sets A to the principal components of each layer's inputs, and ranks by the variance that they explain.

    The batches are repeated until the components converge. A layer whose components explain little may lose its update.

    Raises:
        MethodError: the components do not converge, or a batch has fewer vectors than there are components.
    """
    import torch
    from peft import initialize_lora_eva_weights

    from peftkit.models import packing
    from peftkit.models.loading import cast_parameters

    frozen = next((p.dtype for p in loaded.model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    with packing.eval_modules(loaded.model), contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            initialize_lora_eva_weights(
                loaded.model,
                dataloader=_RepeatedBatches(batches),  # type: ignore[arg-type]
                forward_fn=lambda model, batch: _forward(model, batch, loaded),
                prepare_model_inputs_fn=lambda batch, _: _token_mask(batch, causal=not loaded.head_names),
                prepare_layer_inputs_fn=_layer_inputs,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
        except _DidNotConverge:
            raise MethodError(_failure_reason(output.getvalue())) from None
    cast_parameters(loaded.model, frozen or torch.float32)


class _DidNotConverge(Exception):
    """The batches were repeated ``MAX_EPOCHS`` times."""


@dataclass(frozen=True)
class _RepeatedBatches:
    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(MAX_EPOCHS):
            yield from self.batches
        raise _DidNotConverge


def _failure_reason(output: str) -> str:
    """The reason in terms of the recipe, parsed from what peft printed."""
    skipped = re.search(r"^skipping SVD for (\S+) because there are less than (\S+)", output, re.MULTILINE)
    if skipped is None:
        return "method.init_lora_weights=eva did not converge on the training batches; lower method.rank"
    return (
        f"method.init_lora_weights=eva needs {skipped[2]} vectors per batch, and {skipped[1]} reads fewer; lower "
        "method.rank or method.eva_rho, or add the layer to method.exclude_modules"
    )


def _forward(model: Any, batch: Batch, loaded: LoadedModel) -> None:
    from peftkit.models import pooled_logits
    from peftkit.models.kernels import linear_cross_entropy

    if loaded.head_names:
        pooled_logits.plain_logits(model, batch, loaded.pooling)  # every block reads every token
    else:
        linear_cross_entropy.row_outputs(model, batch)


def _token_mask(batch: Batch, *, causal: bool) -> Tensor:
    """The tokens to analyze, [rows, tokens] bool: all but padding, and only scored ones for language models."""
    mask = batch["attention_mask"].bool()
    return mask & (batch["labels"] != -100) if causal else mask


def _layer_inputs(layer_input: Any, mask: Tensor, layer_name: str) -> Tensor:
    """A layer's inputs at the tokens of the mask, [tokens, width]; a pooler reads one vector per row."""
    hidden: Tensor = (layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input).float()
    return hidden[mask] if hidden.shape[:-1] == mask.shape else hidden.flatten(0, -2)
