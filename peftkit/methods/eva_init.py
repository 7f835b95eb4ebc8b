"""LoRA's start from a few batches of data: EVA (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.schema.types import Batch, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

PASSES = 50
"""Times that EVA goes through its batches at most; two or three are usual."""


def eva(loaded: LoadedModel, batches: Sequence[Batch]) -> None:
    """A from the principal components of each layer's inputs, ranks by how much of the variance they explain.

    Paischer et al. 2024, arXiv:2410.07170. The batches are gone through again and again until the components stand
    still. A layer whose inputs explain little may lose its update altogether.

    Raises:
        MethodError: the components do not come to rest, or a batch holds fewer vectors than there are components.
    """
    import torch
    from peft import initialize_lora_eva_weights

    from peftkit.models import packing
    from peftkit.models.loading import cast_parameters

    frozen = next((p.dtype for p in loaded.model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    with packing.eval_modules(loaded.model), contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            initialize_lora_eva_weights(
                loaded.model,
                dataloader=_Passes(batches),  # type: ignore[arg-type]
                forward_fn=lambda model, batch: _forward(model, batch, loaded),
                prepare_model_inputs_fn=lambda batch, _: _counting(batch, causal=not loaded.head_names),
                prepare_layer_inputs_fn=_inputs,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
        except _DidNotConverge:
            raise MethodError(_why_restless(said.getvalue())) from None
    cast_parameters(loaded.model, frozen or torch.float32)


class _DidNotConverge(Exception):
    """The batches were gone through too often."""


@dataclass(frozen=True)
class _Passes:
    """Batches that let themselves be gone through a bounded number of times."""

    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(PASSES):
            yield from self.batches
        raise _DidNotConverge


def _why_restless(said: str) -> str:
    short = next((line for line in said.splitlines() if line.startswith("skipping SVD for ")), "")
    if short:
        layer, _, count = short.removeprefix("skipping SVD for ").partition(" because there are less than ")
        return (
            f"method.init_lora_weights=eva needs {count.split()[0]} vectors a batch, and {layer} sees fewer; lower "
            "method.rank or method.eva_rho, or name the layer in method.exclude_modules"
        )
    return "method.init_lora_weights=eva found no steady directions in the training batches; lower method.rank"


def _forward(model: Any, batch: Batch, loaded: LoadedModel) -> None:
    from peftkit.models import classifier
    from peftkit.models.kernels import linear_cross_entropy

    if loaded.head_names:
        classifier.plain_logits(model, batch, loaded.pooling)  # every block sees every token
    else:
        linear_cross_entropy.row_outputs(model, batch)


def _counting(batch: Batch, *, causal: bool) -> Tensor:
    """Which tokens count, [rows, tokens] bool: no padding, and of a language model's rows those that are scored."""
    mask = batch["attention_mask"].bool()
    return mask & (batch["labels"] != -100) if causal else mask


def _inputs(layer_input: Any, mask: Tensor, layer_name: str) -> Tensor:
    """What enters a layer at the counting tokens, [tokens, width]; a pooler sees one vector a row."""
    hidden: Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    hidden = hidden.float()
    if hidden.dim() == 3 and hidden.shape[:2] == mask.shape:
        return hidden[mask]
    return hidden.reshape(-1, hidden.shape[-1])
