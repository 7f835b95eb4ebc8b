"""Starting from an existing adapter: its weights take the place of the new ones, if the recipe describes the same.

What follows from the data (dropout, learning rates) may differ. Whatever the weights mean something else under is
compared: the kind of adapter, ranks, scales, the adapted modules, and the shape of a trained head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError, ModelError
from peftkit.models.json_files import read_json
from peftkit.models.stages import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from peftkit.schema.method import Method

FREE = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "lora_dropout", "module_dropout", "dropout", "vera_dropout", "boft_dropout", "miss_dropout", "init_lora_weights",
    "init_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "runtime_config",
    "tokenizer_name_or_path", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "num_layers",
    "num_attention_heads", "token_dim", "num_transformer_submodules",
})  # fmt: skip
"""Fields of peft's configurations that the weights do not depend on, or that their names and shapes show."""
SPELLING = {"r": "rank", "lora_alpha": "alpha", "num_virtual_tokens": "virtual_tokens"}
"""Fields that recipes spell otherwise than peft."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Values of ``init_lora_weights`` that subtract the first update from the base's weights."""
OTHER = "or train a new adapter on top of it with model.adapter_use=merge"


def load_peft(method: Method, loaded: LoadedModel, folder: Path) -> None:
    """Loads an adapter's weights into peft's untrained one; raises MethodError if the recipe describes another.

    On the meta device, it is only checked.
    """
    from peft import set_peft_model_state_dict

    saved, current = _saved_config(folder), loaded.model.peft_config["default"]
    _check_config(method, saved, current.to_dict(), folder)
    tensors = _tensors(folder)
    _check_tensors(method, saved, tensors, _expected(loaded.model), folder)
    if next(loaded.model.parameters()).device.type == "meta":
        return
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    result = set_peft_model_state_dict(loaded.model, tensors, adapter_name="default")
    # a prompt's weights are loaded in a way of their own, and then counted as unexpected
    if unexpected := sorted(set(getattr(result, "unexpected_keys", ())) - {"prompt_embeddings"}):
        raise ModelError(f"{folder}: peft has no use for {unexpected[0]} of {ADAPTER_WEIGHTS}")


def load_native(method: Method, loaded: LoadedModel, folder: Path, shapes: list[dict[str, Any]] | None = None) -> None:
    """Loads the weights of an adapter that peft has no format for; raises MethodError if the recipe describes another.

    Args:
        shapes: of the layers that the method adds, as ``adapter_config.json`` lists them.
    """
    import torch

    saved = read_json(folder / ADAPTER_CONFIG)
    kind = saved.get("type") if isinstance(saved, dict) else None
    if kind != method.kind:
        name = kind or str(saved.get("peft_type", "?")).lower()
        raise MethodError(
            f"model.adapter: {folder} is an adapter of kind {name}, and the recipe sets method.kind={method.kind}; set "
            f"method.kind={name}, {OTHER}"
        )
    trained = {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    tensors = _tensors(folder)
    _check_tensors(method, saved, tensors, {name: tuple(each.shape) for name, each in trained.items()}, folder)
    for old, new in zip(saved.get("adapters") or (), shapes or (), strict=False):
        if different := [name for name in new if name != "dropout" and old.get(name) != new[name]]:
            listed = ", ".join(f"{name} {old.get(name)}" for name in different)
            raise MethodError(
                f"model.adapter: {folder} has adapters with {listed}; set these fields of method, {OTHER}"
            )
    if next(loaded.model.parameters()).device.type == "meta":
        return
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.data = tensors[name].to(parameter.device, torch.float32)


def _saved_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as peft reads it, with its defaults; raises ModelError if peft cannot."""
    from peft import PeftConfig

    values = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: expected peft's adapter configuration, found no peft_type in it")
    if values.get("auto_mapping"):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: auto_mapping names a class to import, which peftkit never does")
    if str(values["peft_type"]).startswith("PEFTKIT"):
        return {**values, "peft_type": values.get("type", "?")}
    try:
        return dict(PeftConfig.from_pretrained(str(folder)).to_dict())
    except Exception as error:  # odd values in a stranger's config break peft in as many ways as there are values
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder / ADAPTER_CONFIG}: peft cannot read it: {first[:200]}") from error


def _check_config(method: Method, saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    kind = _plain(saved["peft_type"])
    if kind != _plain(current["peft_type"]):
        raise MethodError(
            f"model.adapter: {folder} is an adapter of type {kind}, and the recipe sets method.kind={method.kind}; set "
            f"method.kind={str(kind).lower()}, {OTHER}"
        )
    init, own = str(saved.get("init_lora_weights")), str(current.get("init_lora_weights"))
    for value in (init, own):
        if value.startswith(CHANGES_BASE) and init != own:
            raise MethodError(
                f"model.adapter: {folder} was initialized with {init}, and method.init_lora_weights={own}: {value} "
                f"changes the base's weights, on which the adapter stands; set the same, {OTHER}"
            )
    wrong = {
        name: _plain(saved.get(name))
        for name, value in current.items()
        if name not in FREE | {"peft_type"} and _plain(saved.get(name)) != _plain(value)
    }
    if wrong:
        fields = ", ".join(f"{_field(method, name)}={_value(value)}" for name, value in wrong.items())
        raise MethodError(f"model.adapter: {folder} was trained with other settings; set {fields}, {OTHER}")


def _check_tensors(
    method: Method, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:  # fmt: skip
    """Raises MethodError unless the adapter's weights are those of the recipe's, by name and shape."""
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        problem = f"has none for {missing[0]}" if missing else f"has {unknown[0]}, which the recipe does not train"
        remedy = ""
        if (targets := saved.get("target_modules")) and any("lora_" in name for name in (*missing, *unknown)):
            targets = targets if isinstance(targets, str) else _short(targets)
            remedy = f"; set method.target_modules={targets}"
        raise MethodError(
            f"model.adapter: the weights in {folder} are not those that method.kind={method.kind} trains here: it "
            f"{problem}{remedy}, {OTHER}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise MethodError(
                f"model.adapter: {name} in {folder} has shape {list(tensors[name].shape)}, and the recipe trains "
                f"{list(shape)}: its base, its rank or its labels differ; set the fields of method and task as in its "
                f"training, {OTHER}"
            )


def _expected(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that peft saves of an adapter."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file ({error})") from None


def _field(method: Method, name: str) -> str:
    """What a recipe calls a field of peft's configuration."""
    spelled = SPELLING.get(name, name)
    fields = type(method).model_fields
    if spelled in fields:
        return f"method.{spelled}"
    return f"method.arguments.{name}" if "arguments" in fields else f"method.kind=peft and method.arguments.{name}"


def _plain(value: Any) -> Any:
    """A value as JSON has it: an enum's value, sorted lists in place of sets."""
    value = getattr(value, "value", value)
    if isinstance(value, (set, frozenset, tuple)):
        value = list(value)
    if isinstance(value, list):
        with contextlib.suppress(TypeError):
            value = sorted(value)
    return None if value in ([], {}) else value  # peft has both for nothing


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(names: Any, limit: int = 12) -> str:
    """Target modules by the last part of their names."""
    last = sorted({str(name).rpartition(".")[2] for name in names})
    return f"[{', '.join(last[:limit])}{', …' if len(last) > limit else ''}]"
