"""Loading an exported folder: foreign or unsafe files, and another base than the one trained on, are refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peftkit.errors import ModelError
from peftkit.export import manifest, native_adapters
from peftkit.export.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ExportFolder, open_export
from peftkit.export.manifest import Manifest
from peftkit.models import dtypes
from peftkit.models.json_files import read_json
from peftkit.models.kernels import first_token
from peftkit.models.loading import cast_parameters, load_base
from peftkit.models.offload import offload_blocks
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.models.sources import check_config
from peftkit.models.tokenizer import tokenizer_in
from peftkit.schema.recipe import ModelConfig, Recipe, replace
from peftkit.schema.registries import EXPORTERS
from peftkit.schema.types import LoadedModel, in_head

MAX_RANK = 1 << 14


@dataclass(frozen=True)
class LoadedExport(ExportFolder):
    """An export whose model is loaded, in evaluation mode."""

    loaded: LoadedModel

    @property
    def model(self) -> Any:
        """The transformers model, or peft's wrapper around it."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the training."""
        return self.loaded.tokenizer


def load_exported(
    export: str | Path | ExportFolder, *, device: str | None = None, dtype: str | None = None, quantized: bool = True,
    offloaded: bool = False,
) -> LoadedExport:  # fmt: skip
    """Loads a run's export.

    Args:
        export: a run's folder, an exported folder, or one that was opened already.
        device: None takes CUDA if there is one.
        dtype: of frozen weights and matmuls, in place of the recipe's.
        quantized: False loads the base of a quantized recipe unquantized.
        offloaded: whether ``model.offload`` of the recipe takes effect; weights must not be changed then.

    Raises:
        RunError: not a finished run of peftkit.
        ModelError: pickled or damaged weights, another base than the one trained on, or a head that does not fit.
    """
    import torch

    if not isinstance(export, ExportFolder):
        export = open_export(export)
    folder, contents = export.path, export.manifest
    tokenizer = tokenizer_in(folder)
    if contents.saves not in manifest.SAVES:
        loaded = EXPORTERS.get(contents.saves)().load(export, tokenizer)
        return LoadedExport(folder, contents, export.recipe, loaded)
    recipe = _recipe(export, dtype, quantized)
    if not offloaded:
        recipe = replace(recipe, model={"offload": None})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_base(recipe, contents.info, tokenizer, device)
    loaded.pooling = contents.pooling  # type: ignore[assignment]
    if contents.saves == "adapter":
        _load_adapter(loaded, folder, contents)
    else:
        recipe.method.apply(loaded)  # marks what was trained, which stays in fp32
    cast_parameters(loaded.model, dtypes.dtype_for(recipe.model, device))
    loaded.notes += offload_blocks(loaded.model, recipe.model, device)  # while the adapter's weights count as trained
    loaded.model.requires_grad_(False).eval()
    if contents.head.pools and contents.pooling == "own":
        first_token.shorten_last_block(loaded.model)
    return LoadedExport(folder, contents, recipe, loaded)


def load_base_of(export: ExportFolder) -> LoadedModel:
    """The untrained base of an export with its head, unquantized in fp32 on the CPU.

    Raises:
        ModelError: the base is not the one trained on.
    """
    contents = export.manifest
    model = {"pooling": contents.pooling, "dtype": "float32", "offload": None, **_source(export.recipe.model, contents)}
    recipe = replace(_recipe(export, "float32", False), model=model)
    loaded = load_base(recipe, contents.info, tokenizer_in(export.path), "cpu")
    loaded.pooling = contents.pooling  # type: ignore[assignment]
    _check_fingerprint(loaded, contents)
    loaded.model.float().requires_grad_(False).eval()
    return loaded


def check_head(weights: Path, contents: Manifest) -> list[str]:
    """Names of the adapter's weights; raises ModelError if they cannot be read or the head has other labels."""
    if not weights.is_file():
        raise ModelError(f"{weights.parent}: expected {weights.name}, found none; export the run again")
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights}: not a readable safetensors file ({error}); export the run again") from None
    if not contents.heads or contents.head.completes:
        return names
    rows = {shape[0] for name, shape in shapes.items() if len(shape) == 2 and in_head(name, contents.heads[-1:])}
    expected = contents.head.width
    if expected not in rows:
        raise ModelError(
            f"{weights}: expected a head for {expected} labels ({', '.join(contents.info.labels[:6])}), found "
            f"{', '.join(map(str, sorted(rows))) or 'none'}: {manifest.FILE} and weights do not belong together"
        )
    return names


def check_same_names(model: Any, folder: Path, names: list[str], adapter: str) -> None:
    """Raises ModelError unless the weights in the folder are exactly those of the adapter in the model."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    missing, unknown = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or unknown:
        problem = f"lacks {len(missing)} weights, such as {missing[0]}" if missing else f"has no use for {unknown[0]}"
        raise ModelError(f"{folder}: {ADAPTER_WEIGHTS} {problem}: it and {ADAPTER_CONFIG} do not belong together")


def check_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; raises ModelError if it is missing, is not JSON, or names a class or a file elsewhere."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: expected {ADAPTER_CONFIG}, found none; export the run again")
    config = read_json(file)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelError(f"{file}: expected peft's adapter configuration, found no peft_type in it")
    if config.get("auto_mapping"):
        raise ModelError(f"{file}: auto_mapping names a class to import, which peftkit never does; remove it")
    if (folder / "config.json").is_file():  # exports of embedding models use the base's
        check_config(folder)
    return config


def _recipe(export: ExportFolder, dtype: str | None, quantized: bool) -> Recipe:
    """The recipe by which the base is loaded."""
    recipe, contents = export.recipe, export.manifest
    changes: dict[str, Any] = {"model": {"pooling": contents.pooling}}
    if dtype is not None:
        changes["model"]["dtype"] = dtype
    if contents.saves == "model":
        own = {"source": str(export.path.resolve()), "revision": None, "adapter": None, "adapter_use": None,
               "offload": None}  # fmt: skip
        changes["model"] |= own
        if recipe.method.saves == "adapter":
            changes["method"] = {"kind": "full"}  # it is merged
        quantized = False
    else:
        changes["model"] |= _source(recipe.model, contents)
    if not quantized:
        if contents.saves == "adapter" and contents.quantization and contents.quantization["kind"] in KERNELS:
            raise ModelError(
                f"{export.path}: its base is a checkpoint quantized with {contents.quantization['kind']}, which has no "
                "unquantized form to load, or to merge into"
            )
        changes["quantization"] = None
    return replace(recipe, **changes)


def _source(model: ModelConfig, contents: Manifest) -> dict[str, Any]:
    """Fields of the recipe's base. A model that was merged for the run is taken from the cache while it is there."""
    source, plain = model.source, {"adapter": None, "adapter_use": None}
    if any(stage.use == "merged" for stage in contents.stages) and Path(contents.base).is_dir():
        return {**plain, "source": contents.base, "revision": None}
    if model.adapter_use == "merge":
        return {"source": source, "revision": model.revision}
    return {**plain, "source": _moved(source, contents), "revision": contents.revision or model.revision}


def _moved(source: str, contents: Manifest) -> str:
    """The recipe's base; if it is a relative path that does not exist here, the folder where training read it."""
    is_path = source.startswith((".", "/", "~")) or source.endswith(".gguf")
    if is_path and not Path(source).expanduser().exists() and Path(contents.base).is_dir():
        return contents.base
    return source


def _load_adapter(loaded: LoadedModel, folder: Path, contents: Manifest) -> None:
    """Puts the adapter on its base and marks its weights as trained, so that they stay in fp32."""
    _check_fingerprint(loaded, contents)
    names = check_head(folder / ADAPTER_WEIGHTS, contents)
    config = check_adapter_config(folder)
    if config["peft_type"] == native_adapters.TYPE:
        native_adapters.load_onto(loaded.model.requires_grad_(False), folder)
        for name in names:
            loaded.model.get_parameter(name).requires_grad_(True)
        return
    loaded.model = _load_peft(loaded.model, folder, names, config)
    for name, parameter in loaded.model.named_parameters():
        if "default" in name.split("."):
            parameter.requires_grad_(True)


def _check_fingerprint(loaded: LoadedModel, contents: Manifest) -> None:
    if loaded.fingerprint != contents.fingerprint:
        raise ModelError(
            f"this adapter was trained on {contents.source} (fingerprint {contents.fingerprint[:12]}), and the base at "
            f"{loaded.model.name_or_path} is another one ({loaded.fingerprint[:12]}): its files have changed, or "
            "recipe.yaml in the export names another model"
        )


def _load_peft(base: Any, folder: Path, names: list[str], config: dict[str, Any]) -> Any:
    """Loads the adapter by peft itself, as a fresh process would; what peft only warns of is an error here."""
    from peft import PeftModel

    _check_rank(folder, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_same_names reports missing weights
            model = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        # odd values in a stranger's config break peft in as many ways as there are values
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: the adapter does not fit its base: {first[:300]}") from error
    check_same_names(model, folder, names, "default")
    return model


def _check_rank(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelError if a config asks for larger matrices than the weights: memory would be allocated for them."""
    if config.get("peft_type") != "LORA":
        return
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        ranks = [file.get_slice(name).get_shape()[0] for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
    if not ranks:
        return
    pattern = config.get("rank_pattern") or {}
    configured = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ["no mapping"])]
    largest = max(ranks) if len(configured) == 1 else MAX_RANK  # r may be of no layer if each has its own
    for rank in configured:
        if not isinstance(rank, int) or not 0 < rank <= largest:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG}: rank {rank!r:.40}, but the largest rank of the weights is {max(ranks)}: "
                "they do not belong together"
            )
