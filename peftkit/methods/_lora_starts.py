"""Starts of LoRA that need more than the layer's own weights: LoftQ the unquantized ones, EVA a few batches of data."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.parts import Batch, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

PASSES = 50
"""Times that EVA goes through its batches at most; two or three are usual."""


def loftq(loaded: LoadedModel) -> None:
    """A and B from the best low-rank fit to W − Q(W), one step of LoftQ (Li et al. 2023, arXiv:2310.08659).

    (α/r) B A = the leading singular vectors of W − Q(W). W is read from the base's safetensors, a layer at a time.

    Raises:
        MethodError: there are no such files (a GGUF file, weights in another format), or a layer is not in them.
    """
    import torch
    from peft.tuners.lora import Linear4bit
    from peft.utils.integrations import dequantize_module_weight

    base = loaded.model.get_base_model()
    if next(base.parameters()).is_meta:  # planned: there are no values to start from
        return
    files = _tensors(_folder(base))
    with torch.no_grad():
        for name, module in base.named_modules():
            if not isinstance(module, Linear4bit):
                continue
            layer = module.get_base_layer()
            whole = _read(files, name, base).to(layer.weight.device)
            if getattr(layer, "source_cls", torch.nn.Linear) is not torch.nn.Linear:
                whole = whole.T  # Conv1D keeps its weight as [in, out]
            lost = whole.float() - dequantize_module_weight(layer).float()
            left, values, right = torch.linalg.svd(lost, full_matrices=False)
            rank, root = module.r["default"], values[: module.r["default"]].sqrt()
            module.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            module.lora_B["default"].weight.copy_(left[:, :rank] * root / module.scaling["default"])


def _tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _read(files: dict[str, Path], name: str, base: Any) -> Tensor:
    """The unquantized weight of a module; a checkpoint of the backbone alone leaves its prefix out."""
    from safetensors import safe_open

    key = f"{name}.weight"
    key = next((known for known in (key, key.removeprefix(f"{base.base_model_prefix}.")) if known in files), "")
    if not key:
        raise MethodError(
            f"method.init_lora_weights=loftq reads the unquantized weight of {name}, which is in no safetensors file "
            f"of {base.name_or_path}; use another start"
        )
    with safe_open(files[key], framework="pt") as opened:
        return opened.get_tensor(key)


def _folder(base: Any) -> Path:
    """Where the base's files lie: its folder, or the commit that was loaded in the hub's cache."""
    name = str(base.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=getattr(base.config, "_commit_hash", None), local_files_only=True))


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
    from peftkit.models.loading import settle_dtypes

    frozen = next((p.dtype for p in loaded.model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    with packing.still(loaded.model), contextlib.redirect_stdout(io.StringIO()) as said:
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
        except _Restless:
            raise MethodError(_why_restless(said.getvalue())) from None
    settle_dtypes(loaded.model, frozen or torch.float32)


class _Restless(Exception):
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
        raise _Restless


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
    from peftkit.models import classifier, lm_head

    if loaded.head_names:
        classifier.plain_logits(model, batch, loaded.pooling)  # every block sees every token
    else:
        lm_head.row_outputs(model, batch)


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
