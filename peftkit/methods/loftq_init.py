"""LoftQ: LoRA initialized from the NF4 quantization error (Li et al. 2023, arXiv:2310.08659).

    W ≈ Q(W) + (α/r) B A

For weights that are quantized while they are loaded, A and B are fitted to them here. ``peftkit quantize`` fits both
together, on training rows (``quantize/low_rank_fit.py``), and saves the factors next to the base as a peft adapter, in
the folder that LoftQ's own checkpoints on the hub use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from peftkit.errors import MethodError
from peftkit.models.quantization.stored import tensor_keys
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "loftq_init"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def initialize(loaded: LoadedModel) -> None:
    """Sets (α/r) B A to the leading singular vectors of W − Q(W): one step of LoftQ.

    W is read from the base's safetensors, one layer at a time. For a base that was quantized together with such
    factors, the saved factors are loaded.

    Raises:
        MethodError: no file contains a layer's weight (it came from a GGUF file, or is in another format); or the saved
            factors are for other layers or ranks than the method's.
    """
    import torch
    from peft.tuners.lora import Linear4bit
    from peft.utils.integrations import dequantize_module_weight

    base = loaded.model.get_base_model()
    if next(base.parameters()).is_meta:  # a plan's model, which has no weights
        return
    folder = _base_folder(base)
    if saved_rank(folder) is not None:
        _set_factors(base, load_factors(folder))
        return
    files = dict(tensor_keys(folder))
    with torch.no_grad():
        for name, module in base.named_modules():
            if not isinstance(module, Linear4bit):
                continue
            layer = module.get_base_layer()
            weight = _read_weight(files, name, base).to(layer.weight.device)
            if getattr(layer, "source_cls", torch.nn.Linear) is not torch.nn.Linear:
                weight = weight.T  # Conv1D stores its weight as [in, out]
            error = weight.float() - dequantize_module_weight(layer).float()
            left, values, right = torch.linalg.svd(error, full_matrices=False)
            rank, root = module.r["default"], values[: module.r["default"]].sqrt()
            module.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            module.lora_B["default"].weight.copy_(left[:, :rank] * root / module.scaling["default"])


def _set_factors(base: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Copies saved factors into A and B; all must have a layer, because the base was quantized for all of them."""
    import torch

    prefix = f"{base.base_model_prefix}."
    layers = {name.removeprefix(prefix): layer for name, layer in base.named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = layers.get(name.removeprefix(prefix))
            rank = layer.r["default"] if layer is not None else 0
            if layer is None or rank != len(a):
                raise MethodError(
                    f"method.init_lora_weights=loftq: {base.name_or_path} was quantized for a rank of {len(a)} at "
                    f"{name}, and this method has {rank}; use the method's fields that it was quantized with, or "
                    "quantize the base for these"
                )
            root = layer.scaling["default"] ** 0.5
            layer.lora_A["default"].weight.copy_(a / root)
            layer.lora_B["default"].weight.copy_(b / root)


def _read_weight(files: dict[str, Path], name: str, base: Any) -> Tensor:
    """The unquantized weight of a module; checkpoints of a backbone alone name it without the model's prefix."""
    full = f"{name}.weight"
    key = next((key for key in (full, full.removeprefix(f"{base.base_model_prefix}.")) if key in files), None)
    if key is None:
        raise MethodError(
            f"method.init_lora_weights=loftq reads the unquantized weight of {name}, which no safetensors file "
            f"of {base.name_or_path} contains; use another initialization"
        )
    with safe_open(files[key], framework="pt") as file:
        return file.get_tensor(key)


def _base_folder(base: Any) -> Path:
    """The folder of the base's files: its own, or the loaded commit in the hub's cache."""
    name = str(base.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=getattr(base.config, "_commit_hash", None), local_files_only=True))


def layer_ranks(config: Any) -> dict[str, int]:
    """The rank of every layer that a peft LoraConfig targets."""
    return {name: _of_layer(config.rank_pattern, name, config.r) for name in config.target_modules}


def save_factors(folder: Path, config: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Saves factors as a peft adapter: ``PeftModel.from_pretrained(base, base, subfolder="loftq_init")``.

    Args:
        folder: the base's; the adapter goes into ``FOLDER`` inside it.
        config: the peft LoraConfig that the factors were fitted for; the saved adapter has a scale of 1.
        factors: A [rank, in] and B [out, rank], by the layer's name.
    """
    from safetensors.torch import save_file

    ranks = {name: len(a) for name, (a, _) in factors.items() if len(a) != config.r}
    unscaled = dataclasses.replace(
        config, task_type=None, target_modules=sorted(factors), lora_alpha=config.r, rank_pattern=ranks,
        alpha_pattern=dict(ranks), use_rslora=False, use_dora=False, lora_dropout=0.0, modules_to_save=None,
        inference_mode=False,
    )  # fmt: skip
    unscaled.save_pretrained(str(folder / FOLDER))
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": factor.cpu().contiguous()
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair)
    }
    save_file(tensors, folder / FOLDER / WEIGHTS, metadata={"format": "pt"})


def load_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors saved next to a base, by the layer's name; B includes the adapter's scale."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config: Any = LoraConfig.from_pretrained(str(folder / FOLDER))
    tensors = load_file(folder / FOLDER / WEIGHTS)
    factors = {}
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
        alpha = float(_of_layer(config.alpha_pattern, name, config.lora_alpha))
        factors[name] = (a, b * (alpha / (len(a) ** 0.5 if config.use_rslora else len(a))))
    return factors


def unused_factors_note(base: Any) -> str:
    """A note for a run over a base with saved factors that it does not start from; empty for other bases."""
    folder = Path(str(base.name_or_path))
    rank = saved_rank(folder) if folder.is_dir() else None
    if rank is None:
        return ""
    return (
        f"{base.name_or_path} was quantized together with the LoRA of rank {rank} in its {FOLDER}, and is less "
        f"accurate without it: set method.init_lora_weights=loftq method.rank={rank}"
    )


def saved_rank(folder: Path) -> int | None:
    """The rank of the factors saved next to a base; None where there are none."""
    path = folder / FOLDER / CONFIG
    return int(json.loads(path.read_text(encoding="utf-8"))["r"]) if path.is_file() else None


def _of_layer(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """A layer's value by peft's pattern matching."""
    from peft.utils.other import get_pattern_key

    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), name), default)
