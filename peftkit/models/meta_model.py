"""The trainable model of a recipe without weights: what planning runs to see what training will hold.

Built as ``peftkit.models.loading.build`` builds the real one: from the config, with the task's head, stand-ins for
quantized layers, the recipe's method, dtypes and training options. It is put together on the meta device, where
transformers and peft know how to build, and then made of torch's fake tensors, which have a device of their own and so
take the same ways through the code (autocast, attention kernels) as real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peftkit.errors import ModelError
from peftkit.models import loading
from peftkit.models.quantization import stored
from peftkit.models.quantization.checkpoint import check_recipe, quantized_with
from peftkit.models.quantization.meta_layers import OUTER_BLOCK, Held, replace_linear
from peftkit.models.sources import folder_of, resolve
from peftkit.models.training_options import prepare_for_training
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel, TaskInfo


def build_meta_model(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, dtype: torch.dtype, *, held: Held | None = None, gpu: bool = False
) -> LoadedModel:
    """The recipe's model as it will be trained, on tensors without data; call it inside a ``FakeTensorMode``.

    Args:
        dtype: of frozen weights.
        held: how quantized weights are held; None takes the recipe's quantization.
        gpu: whether the run is planned for a GPU, where attention is torch's own.

    Raises:
        ModelError: the base cannot be used for this task.
        MethodError: the method cannot work on this base.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.initialization import no_init_weights

    folder = folder_of(resolve(recipe.model), weights=False)
    head = head_of(info, recipe.task)
    pooling = loading.choose_pooling(recipe, head, folder)
    config = loading._configure(recipe, head, tokenizer, folder)
    recipe.method.check_base(config, recipe)
    check_recipe(config, recipe)
    arguments: dict[str, Any] = {"dtype": torch.float32 if recipe.method.saves == "model" else dtype}
    if recipe.model.attention != "auto":
        arguments["attn_implementation"] = recipe.model.attention
    skipped = loading.never_quantized(config, pooling, head, folder)
    held = held or held_by(recipe) or _held_in(config, recipe, folder)
    with unset_fake_temporarily(), torch.device("meta"):
        with no_init_weights():
            model = loading._auto_class(head, pooling).from_config(config, trust_remote_code=False, **arguments)
        model.tie_weights()
        missing = {"missing_keys": _missing(model, folder)}
        loaded = LoadedModel(model, tokenizer, pooling, auto_class=head.auto_class(pooling))
        loaded.head_names = loading._heads(model, missing) if head.adds_layers else ()
        if held is not None:
            replace_linear(model, held, dtype, skipped)
        recipe.method.apply(loaded)
        loading.cast_parameters(loaded.model, dtype)
    move_to_fake(loaded.model)
    prepare_for_training(loaded, recipe, head)
    if gpu and recipe.model.attention == "auto":
        model.set_attn_implementation("sdpa")
    return loaded


def move_to_fake(model: torch.nn.Module) -> None:
    """Meta tensors become CPU tensors of the mode that is active; tied ones stay tied, attributes stay with them."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            fresh.__dict__.update(tensor.__dict__)
            moved[id(tensor)] = fresh
        return moved[id(tensor)]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = move(tensor)


def held_by(recipe: Recipe) -> Held | None:
    """How the recipe's quantization holds a matrix; None for none."""
    kind = recipe.quantization
    return Held(kind.kind, double=getattr(kind, "double", False)) if kind is not None else None


def _held_in(config: Any, recipe: Recipe, folder: Path) -> Held | None:
    """How a checkpoint of quantized weights holds them; raises ModelError for kinds whose bytes are not known."""
    kind = quantized_with(config)
    if kind is None:
        return None
    if kind != "bitsandbytes":
        raise ModelError(
            f"model.source={recipe.model.source}: how many bytes weights quantized with {kind} take in training is not "
            "known, so that it cannot be planned; plan the unquantized model with quantization.kind=nf4 for a bound"
        )
    values = config.quantization_config
    if not values.get("load_in_4bit"):
        return Held("int8")
    if found := stored.blocks(folder):
        return Held("nf4", found.outer is not None, found.size, found.outer or OUTER_BLOCK)
    return Held("nf4", double=bool(values.get("bnb_4bit_use_double_quant")))


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that are there; 0 where the weights have not been fetched."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _missing(model: Any, folder: Path) -> list[str]:
    """Parameters that the checkpoint does not hold, as far as its files are there to be asked."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    if not found:
        return []
    prefix = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not {name, name.removeprefix(prefix)} & found]
