"""Builds the trainable model of a recipe: base weights, head, dtypes, method."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from peftkit.errors import ModelError, RecipeError
from peftkit.models import dtypes
from peftkit.models.architectures import check_encodes, check_trains, check_writes, padding_note
from peftkit.models.json_files import read_json
from peftkit.models.offload import is_offloaded, offload_blocks
from peftkit.models.quantization import checkpoint, stored
from peftkit.models.quantization.bitsandbytes_support import keep_gradients
from peftkit.models.sources import check_config, fingerprint, folder_of, resolve, stages_of
from peftkit.models.stages import check_base, find_adapter, trained_in
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import pad_note, tokenizer_in
from peftkit.models.training_options import prepare_for_training
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import ModelConfig, Recipe
from peftkit.schema.registries import HEADS
from peftkit.schema.types import LoadedModel, TaskInfo, in_head

Pooling = Literal["own", "mean", "cls", "last"]


def build(recipe: Recipe, info: TaskInfo, tokenizer: Any, device: torch.device | str | None = None) -> LoadedModel:
    """The trainable model of a recipe, with head and adapters initialized from ``training.seed``.

    Frozen weights have the compute dtype, trained ones are fp32; run the forward under ``dtypes.autocast(dtype)``.

    Raises:
        ModelError: the base cannot be used for this task.
        MethodError: the method cannot work on this base.
        HubError: the base cannot be downloaded.
    """
    transformers.set_seed(recipe.training.seed)
    loaded = load_base(recipe, info, tokenizer, device)
    recipe.method.apply(loaded)
    if recipe.model.continues:
        continue_adapter(loaded, recipe, info)
    cast_parameters(loaded.model, dtypes.dtype_for(recipe.model, device))
    loaded.notes += offload_blocks(loaded.model, recipe.model, device)
    prepare_for_training(loaded, recipe, head_of(info, recipe.task))
    return loaded


def continue_adapter(loaded: LoadedModel, recipe: Recipe, info: TaskInfo) -> None:
    """Starts the applied method from the recipe's adapter, and records where it comes from.

    Raises:
        ModelError: there is no such adapter, it stands on another base, or its head is for other labels.
        MethodError: the recipe's method is another than the adapter's.
    """
    adapter, source = find_adapter(recipe.model), resolve(recipe.model)
    planned = next(loaded.model.parameters()).device.type == "meta"
    checked = "" if planned else check_base(adapter, recipe.model.source, folder_of(source), loaded.fingerprint)
    contents = adapter.contents
    if contents and loaded.head_names and not adapter.has_head_for(info, loaded.auto_class):
        labels = ", ".join(contents["info"]["labels"][:6])
        raise ModelError(
            f"model.adapter: {adapter.path} has a head for {labels or 'no labels'}, and this task's is for "
            f"{', '.join(info.labels[:6])}; continuing keeps the head: set data.labels to the adapter's, or use "
            "model.adapter_use=merge, which takes the backbone and a new head"
        )
    if contents and contents["pooling"] != loaded.pooling:
        raise ModelError(
            f"model.adapter: {adapter.path} was trained with pooling {contents['pooling']}, and this run would pool "
            f"with {loaded.pooling}; set model.pooling={contents['pooling']}"
        )
    recipe.method.load_adapter(loaded, adapter.path)
    if planned:
        return
    loaded.adapter = adapter.digest
    stage = adapter.stage("continued", checked)
    loaded.stages = (*(adapter.earlier or loaded.stages), stage)
    loaded.notes.append(f"training continues from the adapter of {stage.describe()}; checked: {checked}")
    if contents and tokenizer_in(adapter.path).chat_template != loaded.tokenizer.chat_template:
        loaded.notes.append(
            f"the adapter of {stage.run} was trained with another chat template than this run's (see "
            "model.chat_template)"
        )


def load_base(recipe: Recipe, info: TaskInfo, tokenizer: Any, device: torch.device | str | None = None) -> LoadedModel:
    """The base model with the task's head, before a method is applied; on its device, or to be offloaded on the CPU."""
    silence_libraries()
    source = resolve(recipe.model)
    folder = folder_of(source, weights=False)
    head = head_of(info, recipe.task)
    pooling = choose_pooling(recipe, head, folder)
    config = load_config(recipe, head, tokenizer, folder)
    check_trains(config, device, folder)
    recipe.method.check_base(config, recipe)
    packed = checkpoint.check(config, recipe)
    folder = folder_of(source)  # weights are downloaded once every check has passed
    dtype = torch.float32 if recipe.method.saves == "model" else dtypes.dtype_for(recipe.model, device)
    device = "cpu" if is_offloaded(recipe.model, device) else device
    arguments: dict[str, Any] = {"dtype": dtype}
    quantized = recipe.quantization is not None or packed is not None
    skipped = never_quantized(config, pooling, head, folder) if quantized else ()
    if recipe.quantization is not None:
        arguments |= recipe.quantization.load_arguments(recipe.model, skipped)
    if packed is not None:
        config.quantization_config = checkpoint.runtime_config(config, packed, skipped, dtype)
    if quantized:
        arguments["device_map"] = {"": str(device or "cpu")}
    if recipe.model.attention != "auto":
        arguments["attn_implementation"] = recipe.model.attention
    trained = trained_in(folder)
    # a head for other labels, even of the same shape, answers another question
    replaced = () if trained is None or trained.has_head_for(info, head.auto_class(pooling)) else trained.heads
    model, head_names, notes = _from_pretrained(folder, config, pooling, head, arguments, replaced)
    notes += [f"the base comes from {stage.describe()}; checked: {stage.checked}" for stage in stages_of(source)]
    # adapters and cards must name a base that the user can load, not a path inside a cache
    model.config._name_or_path = model.name_or_path = source.location if source.kind == "hub" else str(folder)
    if quantized:
        keep_gradients(model)
    elif device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides the signature
    notes += [note for note in (pad_note(tokenizer), padding_note(model.config)) if note]
    auto = head.auto_class(pooling)
    return LoadedModel(
        model, tokenizer, pooling, head_names, fingerprint(folder), notes, auto, stages=stages_of(source)
    )


def load_language_model(recipe: Recipe, device: torch.device | str | None = None) -> PreTrainedModel:
    """The untrained base as a language model, for zero-shot prompts."""
    place = "cpu" if is_offloaded(recipe.model, device) else device
    folder, dtype = folder_of(resolve(recipe.model)), dtypes.dtype_for(recipe.model, device)
    model = load_plain(recipe.model, folder, causal=True, device=place, dtype=dtype)
    offload_blocks(model.requires_grad_(False), recipe.model, device)
    return model


def load_plain(
    model: ModelConfig, folder: Path, *, causal: bool, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, **arguments: Any,
) -> PreTrainedModel:  # fmt: skip
    """The model in a folder, in evaluation mode: a language model, or a backbone; raises ModelError if it fails."""
    auto: Any = AutoModelForCausalLM if causal else AutoModel
    dtype = dtype or dtypes.dtype_for(model, device)
    device_map = {"": str(device or "cpu")}  # quantized checkpoints cannot be moved later
    try:
        loaded: Any = auto.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=False, use_safetensors=True, **arguments
        )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from error
    return loaded.eval()  # type: ignore[no-any-return]


def heads_of(config: PreTrainedConfig, folder: Path) -> tuple[str, ...]:
    """Names of the modules on top of the backbone, over all tasks that the architecture can be loaded for."""
    names: list[str] = []
    uses: dict[str, tuple[Pooling, Head]] = {}
    poolings: tuple[Pooling, ...] = ("own", "mean")
    for head in (head_of(TaskInfo(name)) for name in HEADS):
        for pooling in poolings if head.pools else poolings[:1]:
            uses.setdefault(head.auto_class(pooling), (pooling, head))
    for pooling, head in uses.values():
        if type(config) in auto_class(head, pooling)._model_mapping:
            names += never_quantized(config, pooling, head, folder)
    return tuple(dict.fromkeys([*names, "pooler"]))


def writes_text(config: PreTrainedConfig) -> bool:
    """Whether the architecture is a decoder, and not a masked language model with a causal variant."""
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in causal and config.model_type not in masked


def choose_pooling(recipe: Recipe, head: Head, folder: Path) -> Pooling:
    """The recipe's pooling; ``auto`` is a sentence encoder's own where the backbone is frozen or lightly tuned.

    That gains ten points for a head on frozen features (MiniLM on AG News: 0.88 instead of 0.78); bottleneck adapters
    reach in 50 steps what otherwise takes hundreds (0.81 instead of 0.39). A trained backbone learns to use its own
    pooler just as well (LoRA: 0.899 and 0.901), and ``AutoModelForSequenceClassification`` can then load the adapter.
    """
    if head.embeds:
        chosen = recipe.model.pooling
        return embedding_pooling(folder) if chosen == "auto" or chosen == "own" else chosen
    if recipe.model.pooling == "last":
        raise RecipeError("model.pooling=last is for embeddings; a decoder's classifier reads the last token with own")
    if head.pools and recipe.model.pooling != "auto":
        return recipe.model.pooling
    pooling = sentence_pooling(folder) if head.pools and not recipe.method.learns_pooling else "own"
    return pooling if pooling in ("mean", "cls") else "own"


def embedding_pooling(folder: Path) -> Literal["mean", "cls", "last"]:
    """How hidden states become a text's vector: as a sentence encoder declares, else a decoder's last, or the mean."""
    known = sentence_pooling(folder)
    if known is not None:
        return known
    return "last" if writes_text(AutoConfig.from_pretrained(folder, trust_remote_code=False)) else "mean"


def sentence_pooling(folder: Path) -> Literal["mean", "cls", "last"] | None:
    """A sentence encoder's pooling, from sentence-transformers' 1_Pooling/config.json; None without a known one."""
    file = folder / "1_Pooling" / "config.json"
    values = read_json(file) if file.is_file() else {}
    mode = values.get("pooling_mode")
    if values.get("pooling_mode_mean_tokens") or mode == "mean":
        return "mean"
    if values.get("pooling_mode_cls_token") or mode == "cls":
        return "cls"
    return "last" if values.get("pooling_mode_lasttoken") or mode in ("last", "lasttoken") else None


def never_quantized(config: PreTrainedConfig, pooling: Pooling, head: Head, folder: Path) -> tuple[str, ...]:
    """Names of heads, pooler and output embeddings, from the architecture, before weights are loaded.

    For a checkpoint of bitsandbytes: also what its files store unquantized, but nothing that they store quantized,
    except heads.
    """
    with torch.device("meta"):
        model = auto_class(head, pooling).from_config(config, trust_remote_code=False)
    output = model.get_output_embeddings()
    others = [name for name, module in model.named_modules() if module is output and output is not None]
    heads = head_modules(head, model)
    others += [f"{model.base_model_prefix}.pooler"] if head.adds_layers else []
    others += top_modules(model) if head.completes else []
    if checkpoint.quantized_with(config) == "bitsandbytes":
        others += config.quantization_config.get("llm_int8_skip_modules") or ()
        return stored.never_packed(model, heads, others, folder)
    return tuple(dict.fromkeys([*others, *heads]))


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen floating-point weights to ``dtype`` and trainable ones to fp32; quantized weights are left alone.

    A norm that is partly trained is cast to fp32 entirely, because it computes in one dtype.
    """
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        trained_norm = any(p.requires_grad for p in parameters) and all(p.ndim <= 1 for p in parameters)
        for parameter in parameters:
            if parameter.requires_grad or (trained_norm and parameter.is_floating_point()):
                parameter.data = parameter.data.float()
            elif parameter.is_floating_point() and not _is_packed(parameter):
                parameter.data = parameter.data.to(dtype)


def _is_packed(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter is quantized: bitsandbytes attaches a state, torchao wraps other tensors."""
    return hasattr(parameter, "quant_state") or is_traceable_wrapper_subclass(parameter.data)


def load_config(recipe: Recipe, head: Head, tokenizer: Any, folder: Path) -> PreTrainedConfig:
    """The base's config, with the task's labels, the tokenizer's pad token and the recipe's dropout."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        kind = check_config(folder).get("model_type")
        raise ModelError(f"{folder}: model type '{kind}' is not known to this version of transformers") from error
    if head.encodes_source:
        check_encodes(config, folder)
    elif head.writes_text:
        check_writes(config, folder)
    head.configure(config)
    config.pad_token_id = tokenizer.pad_token_id
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if recipe.model.dropout is not None:
        _set_dropout(config, recipe.model.dropout)
    rows, largest = getattr(config.get_text_config(), "vocab_size", None), max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:  # CANINE hashes characters
        raise ModelError(
            f"{folder}: tokenizer and model do not belong together: token ids go up to {largest}, and the embeddings "
            f"have {rows} rows"
        )
    return config


def _set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Every dropout field of the config: ``hidden_dropout_prob``, ``attention_dropout``, ``resid_pdrop``, …"""
    for name, value in config.to_dict().items():
        is_rate = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if is_rate and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, rate)


def _from_pretrained(
    folder: Path, config: PreTrainedConfig, pooling: Pooling, head: Head, arguments: dict[str, Any],
    replaced: tuple[str, ...] = (),
) -> tuple[PreTrainedModel, tuple[str, ...], list[str]]:  # fmt: skip
    """Loads the weights; only those of the head may be missing or differ in shape; ``replaced`` heads are new ones."""
    auto = auto_class(head, pooling)
    if type(config) not in auto._model_mapping:
        kind = auto.__name__.removeprefix("AutoModelFor")
        remedy = "set model.pooling=own" if pooling != "own" else "choose another base model"
        raise ModelError(f"{folder}: {config.model_type} models have no {kind} in transformers; {remedy}")
    try:
        model, report = auto.from_pretrained(
            folder, config=config, trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, **arguments,
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from error
    heads = head_modules(head, model, report["missing_keys"])
    notes = _check_report(report, heads, folder, model, head)
    if replaced and (replaced := tuple(name for name in heads if name in replaced)):
        _reinitialize(model, replaced)
        notes = [f"the head of the earlier run ({', '.join(replaced)}) is for other labels: this run's is new"]
    return model, heads, notes


def _reinitialize(model: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """Draws the weights of heads anew, as the architecture initializes them."""
    for module in (module for name in heads for module in model.get_submodule(name).modules()):
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else transformers leaves it
        model._init_weights(module)


def auto_class(head: Head, pooling: Pooling) -> Any:
    """The class of transformers that loads the head's models."""
    return getattr(transformers, head.auto_class(pooling))


def head_modules(head: Head, model: PreTrainedModel, missing_keys: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the modules that the head adds on top of the backbone, and of a pooler that the checkpoint lacks."""
    if head.completes:
        return _missing_layers(model, missing_keys)
    if not head.adds_layers:
        return ()
    names = top_modules(model)
    return (*names, "pooler") if any(".pooler." in key for key in missing_keys) else tuple(names)


def top_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with weights on top of the backbone."""
    top = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name, child in top if any(True for _ in child.parameters())]


def _missing_layers(model: PreTrainedModel, missing_keys: Iterable[str]) -> tuple[str, ...]:
    """Full names of the layers on top of the backbone that a checkpoint lacks.

    An output layer that shares the embeddings' weight is there without weights of its own; its bias starts at zero.
    """
    missing, output = set(missing_keys), model.get_output_embeddings()
    layers = {key.rpartition(".")[0] for key in missing if not key.startswith(f"{model.base_model_prefix}.")}
    return tuple(
        name
        for name, module in model.named_modules()
        if name in layers and not any(True for _ in module.children())
        if module is not output or f"{name}.weight" in missing
    )


def _check_report(
    report: dict[str, Any], heads: tuple[str, ...], folder: Path, model: PreTrainedModel, head: Head
) -> list[str]:
    """Raises ModelError if weights outside the heads are missing; returns a note on heads that are reused, or new."""
    fresh = {*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])}
    unused = set(heads) if heads else {"pooler"}  # which many checkpoints lack, and nothing but a classifier reads
    missing = sorted(key for key in fresh if not in_head(key, unused))
    if head.completes:
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise ModelError(
            f"{folder}: the checkpoint lacks {len(missing)} of the weights of {type(model).__name__}, such as "
            f"{missing[0]}: it is incomplete, or belongs to another architecture"
        )
    if head.completes:
        return [_new_layers_note(heads)] if heads else []
    reused = [name for name in heads if not any(name in key.split(".") for key in fresh)]
    return [f"the base's own head was kept ({', '.join(reused)}): its shape fits the task"] if reused else []


def _new_layers_note(names: tuple[str, ...]) -> str:
    """What the user should know of output layers that a checkpoint lacks."""
    return (
        f"the checkpoint lacks the layers of this task's output: {', '.join(names)} are new and trained in full, under "
        "the base's own token embeddings, and its scores before training mean nothing"
    )
