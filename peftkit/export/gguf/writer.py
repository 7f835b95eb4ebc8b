"""Writes GGUF files with the ``gguf`` package: a whole model, or the A and B of a LoRA.

Weights are rounded and written one after the other, so that no second copy of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.errors import MethodError
from peftkit.export.gguf import types, vocabulary
from peftkit.export.gguf.architecture import Architecture
from peftkit.export.gguf.types import FileType

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

LORA_ONLY = "a GGUF adapter holds LoRA's A and B only"
FROM_BASE = ("pissa", "olora", "corda", "loftq")
"""Initializations by which peft changes the weights of the base."""


def write_model(
    file: Path, model: Any, tokenizer: Any, architecture: Architecture, file_type: FileType, *, name: str
) -> None:
    """Writes a transformers model with its tokenizer.

    Args:
        model: in fp32 on the CPU, without an adapter.
        name: of the model, for people.

    Raises:
        MethodError: llama.cpp has no place for one of its weights.
        ModelError: llama.cpp has no such tokenizer, or a weight cannot be rounded to the type.
    """
    from gguf import GGUFWriter, LlamaFileType

    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = output is not None and output.weight.data_ptr() == embedding.data_ptr()
    writer = GGUFWriter(file, _architecture_name(architecture))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[types.FILE_TYPES[file_type]])
    writer.add_quantization_version(2)
    writer.add_vocab_size(len(embedding))
    architecture.write_keys(writer)
    vocabulary.write(writer, tokenizer, len(embedding), vocabulary.stop_ids(model, tokenizer))
    tensors = dict(architecture.tensors(dict(model.state_dict()), tied))
    kinds = {
        name: types.tensor_type(file_type, name, tuple(one.shape), architecture.layers) for name, one in tensors.items()
    }
    _write(writer, tensors, kinds)


def write_adapter(file: Path, adapter: Mapping[str, Tensor], config: Any, architecture: Architecture) -> None:
    """Writes the LoRA of a peft adapter in fp32; B is scaled where a layer has another scale than the whole.

    Args:
        adapter: weights under peft's names.
        config: peft's LoraConfig.

    Raises:
        MethodError: the adapter holds more than A and B of linear layers.
    """
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter

    if reason := unsupported_adapter(adapter, config):
        raise MethodError(reason)
    tensors: dict[str, Tensor] = {}
    for name in sorted(adapter):
        module, _, _ = name.removeprefix("base_model.model.").rpartition(".lora_")
        weight = f"{module}.weight"
        if name.endswith(".lora_A.weight"):
            tensors[f"{architecture.tensor_name(weight)}.lora_a"] = adapter[name].float()
            continue
        b = adapter[name].float() * (scaling(config, module, adapter[name].shape[1]) * adapter[name].shape[1])
        tensors[f"{architecture.tensor_name(weight)}.lora_b"] = architecture.rows(weight, b / config.lora_alpha)
    writer = GGUFWriter(file, _architecture_name(architecture))
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config.lora_alpha))
    _write(writer, tensors, dict.fromkeys(tensors, GGMLQuantizationType.F32))


def unsupported_adapter(names: Sequence[str] | Mapping[str, Any], config: Any) -> str:
    """Why a peft adapter cannot be a GGUF adapter; empty if it can."""
    if config.peft_type != "LORA":
        kind = config.peft_type.value
        return f"{LORA_ONLY}, and this is {kind}: export it with --format lora first, or as content=merged"
    if config.use_dora:
        return f"{LORA_ONLY}, and this adapter has DoRA's magnitudes; use content=merged"
    init = str(config.init_lora_weights)
    if init.startswith(FROM_BASE):
        return (
            f"{LORA_ONLY}, and this one fits a base from which its {init} initialization was subtracted: export it "
            "with --format lora first, or as content=merged"
        )
    others = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    return f"{LORA_ONLY}, and this adapter has {others[0]}; use content=merged" if others else ""


def scaling(config: Any, module: str, rank: int) -> float:
    """The factor of B A in a layer, with its own alpha where ``alpha_pattern`` names it."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def _architecture_name(architecture: Architecture) -> str:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[MODEL_ARCH[architecture.name]]


def _write(writer: GGUFWriter, tensors: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        shape, dtype = types.byte_shape(tuple(tensor.shape), kinds[name])
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        writer.write_tensor_data(types.encode(values, kinds[name], name))
    writer.close()
