"""The trainable model of a recipe without data, for planning.

Built in the same steps as ``peftkit.models.loading.build``. It is assembled on the meta device, which transformers and
peft support, and then converted to torch's fake tensors: these have a real device, and so take the same paths through
the code (autocast, attention kernels) as real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.initialization import no_init_weights

from peftkit.errors import ModelError
from peftkit.models import loading
from peftkit.models.meta_layers import replace_linear
from peftkit.models.quantization import stored
from peftkit.models.quantization.checkpoint import check_recipe, quantized_with
from peftkit.models.quantization.stored import WeightFormat
from peftkit.models.sources import folder_of, resolve
from peftkit.models.training_options import prepare_for_training
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel, TaskInfo


def build_meta_model(
    recipe: Recipe, info: TaskInfo, tokenizer: Any, dtype: torch.dtype, *, weight_format: WeightFormat | None = None,
    gpu: bool = False,
) -> LoadedModel:  # fmt: skip
    """The recipe's model as it will be trained, on tensors without data; call it inside a ``FakeTensorMode``.

    Args:
        dtype: of frozen weights.
        weight_format: of quantized weights; None is the format of the recipe's quantization or of the checkpoint.
        gpu: whether the run is planned for a GPU, which uses torch's own attention.

    Raises ModelError or MethodError as ``peftkit.models.loading.build`` does.
    """
    folder = folder_of(resolve(recipe.model), weights=False)
    head = head_of(info, recipe.task)
    pooling = loading.choose_pooling(recipe, head, folder)
    config = loading.load_config(recipe, head, tokenizer, folder)
    recipe.method.check_base(config, recipe)
    check_recipe(config, recipe)
    arguments: dict[str, Any] = {"dtype": torch.float32 if recipe.method.saves == "model" else dtype}
    if recipe.model.attention != "auto":
        arguments["attn_implementation"] = recipe.model.attention
    skipped = loading.never_quantized(config, pooling, head, folder)
    weight_format = weight_format or _weight_format(config, recipe, folder)
    with unset_fake_temporarily(), torch.device("meta"):
        with no_init_weights():
            model = loading.auto_class(head, pooling).from_config(config, trust_remote_code=False, **arguments)
        model.tie_weights()
        loaded = LoadedModel(model, tokenizer, pooling, auto_class=head.auto_class(pooling))
        loaded.head_names = loading.head_modules(head, model, _missing_keys(model, folder))
        if weight_format is not None:
            replace_linear(model, weight_format, dtype, skipped)
        recipe.method.widest().apply(loaded)
        if recipe.model.continues:
            loading.continue_adapter(loaded, recipe, info)
        loading.cast_parameters(loaded.model, dtype)
    move_to_fake(loaded.model)
    prepare_for_training(loaded, recipe, head)
    if gpu and recipe.model.attention == "auto":
        model.set_attn_implementation("sdpa")
    return loaded


def move_to_fake(model: torch.nn.Module) -> None:
    """Converts meta tensors to CPU tensors of the active mode; tied ones stay tied, and attributes are copied."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fake.__dict__.update(tensor.__dict__)
            moved[id(tensor)] = fake
        return moved[id(tensor)]

    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            registry.update({name: move(tensor) for name, tensor in registry.items() if tensor is not None})


def _weight_format(config: Any, recipe: Recipe, folder: Path) -> WeightFormat | None:
    """How the recipe's quantization, or else the checkpoint's, stores a matrix; ModelError where that is unknown."""
    if recipe.quantization is not None:
        return WeightFormat(recipe.quantization.kind, double=getattr(recipe.quantization, "double", False))
    kind = quantized_with(config)
    if kind is None:
        return None
    if kind != "bitsandbytes":
        raise ModelError(
            f"model.source={recipe.model.source}: memory cannot be planned for weights quantized with {kind}; plan the "
            "unquantized model with quantization.kind=nf4 for an upper bound"
        )
    values = config.quantization_config
    if not values.get("load_in_4bit"):
        return WeightFormat("int8")
    return stored.nf4_format(folder) or WeightFormat("nf4", double=bool(values.get("bnb_4bit_use_double_quant")))


def weight_file_bytes(folder: Path) -> int:
    """Size of the folder's safetensors files; 0 if the weights have not been downloaded."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _missing_keys(model: Any, folder: Path) -> list[str]:
    """Parameters that the checkpoint lacks; none if its files have not been downloaded."""
    keys, prefix = {key for key, _ in stored.tensor_keys(folder)}, f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if keys and not {name, name.removeprefix(prefix)} & keys]
