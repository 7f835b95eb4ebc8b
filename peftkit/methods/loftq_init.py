"""LoRA's start from what NF4 rounded off: LoftQ (Li et al. 2023, arXiv:2310.08659).

    W ≈ Q(W) + (α/r) B A

Over weights that are rounded as they are loaded, A and B are fitted to them here. ``peftkit quantize`` fits both
together, on training rows (``models/loftq.py``), and writes the factors beside the base as an adapter of peft's, in the
folder that LoftQ's own checkpoints on the hub have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "loftq_init"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def start(loaded: LoadedModel) -> None:
    """A and B from the best low-rank fit to W − Q(W), one step of LoftQ (Li et al. 2023, arXiv:2310.08659).

    (α/r) B A = the leading singular vectors of W − Q(W). W is read from the base's safetensors, a layer at a time. Over
    a base that was quantized together with such factors, these are taken.

    Raises:
        MethodError: there are no such files (a GGUF file, weights in another format), or a layer is not in them; or the
            factors beside the base are of other layers or ranks than the method's.
    """
    import torch
    from peft.tuners.lora import Linear4bit
    from peft.utils.integrations import dequantize_module_weight

    base = loaded.model.get_base_model()
    if next(base.parameters()).is_meta:  # planned: there are no values to start from
        return
    folder = _folder(base)
    if rank_beside(folder) is not None:
        _take(loaded, read(folder))
        return
    files = _tensors(folder)
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


def _take(loaded: LoadedModel, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Puts factors that were made with the base into A and B; all of them, for the base was rounded for all of them."""
    import torch

    base = loaded.model.get_base_model()
    prefix = f"{base.base_model_prefix}."
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    known = {name.removeprefix(prefix): module for name, module in layers.items()}
    with torch.no_grad():
        for name, (a, b) in starts.items():
            layer = known.get(name.removeprefix(prefix))
            rank = layer.r["default"] if layer is not None else 0
            if layer is None or rank != len(a):
                raise MethodError(
                    f"method.init_lora_weights=loftq: {base.name_or_path} was quantized for a rank of {len(a)} at "
                    f"{name}, and this method has {rank}; take the method's fields that it was quantized with, or "
                    "quantize the base for these"
                )
            root = layer.scaling["default"] ** 0.5
            layer.lora_A["default"].weight.copy_(a / root)
            layer.lora_B["default"].weight.copy_(b / root)


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


def ranks_of(config: Any) -> dict[str, int]:
    """The rank of every layer that peft's LoraConfig names."""
    from peft.utils.other import get_pattern_key

    patterns = config.rank_pattern or {}
    return {name: patterns.get(get_pattern_key(list(patterns), name), config.r) for name in config.target_modules}


def write(folder: Path, config: Any, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Writes factors as an adapter of peft's: ``PeftModel.from_pretrained(base, base, subfolder="loftq_init")``.

    Args:
        folder: of the base; the adapter becomes ``FOLDER`` in it.
        config: peft's LoraConfig that the factors were made for; what is written has a scale of 1.
        starts: by the layer's name.
    """
    from safetensors.torch import save_file

    ranks = {name: len(a) for name, (a, _) in starts.items() if len(a) != config.r}
    told = dataclasses.replace(
        config, task_type=None, target_modules=sorted(starts), lora_alpha=config.r, rank_pattern=ranks,
        alpha_pattern=dict(ranks), use_rslora=False, use_dora=False, lora_dropout=0.0, modules_to_save=None,
        inference_mode=False,
    )  # fmt: skip
    told.save_pretrained(str(folder / FOLDER))
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": one.cpu().contiguous()
        for name, both in starts.items()
        for letter, one in zip("AB", both)
    }
    save_file(tensors, folder / FOLDER / WEIGHTS, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that lie beside a base, by the layer's name, the scale of their adapter within B."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config: Any = LoraConfig.from_pretrained(str(folder / FOLDER))
    tensors = load_file(folder / FOLDER / WEIGHTS)
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
            found[name] = (a, b * (_alpha(config, name) / (len(a) ** 0.5 if config.use_rslora else len(a))))
    return found


def unused(base: Any) -> str:
    """What to tell of a base that was rounded for factors which a run does not start from; empty else."""
    folder = Path(str(base.name_or_path))
    rank = rank_beside(folder) if folder.is_dir() else None
    if rank is None:
        return ""
    return (
        f"{base.name_or_path} was quantized to be completed by the LoRA of rank {rank} in its {FOLDER}, and is less "
        f"exact without: set method.init_lora_weights=loftq method.rank={rank}"
    )


def rank_beside(folder: Path) -> int | None:
    """The rank of the factors beside a base; None where there are none."""
    path = folder / FOLDER / CONFIG
    return int(json.loads(path.read_text(encoding="utf-8"))["r"]) if path.is_file() else None


def _alpha(config: Any, name: str) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.alpha_pattern or {}
    return float(patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha))
