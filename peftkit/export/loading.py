"""Loads an exported folder again, refusing what is foreign, unsafe, or made for another base."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peftkit.errors import ModelError, RunError
from peftkit.export import manifest, own_format
from peftkit.export.manifest import Manifest
from peftkit.models import dtypes
from peftkit.models.kernels import first_token
from peftkit.models.loading import cast_parameters, load_base
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.models.sources import PICKLED, check_config, read_json
from peftkit.models.tokenizer import tokenizer_in
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import LoadedModel

MAX_RANK = 1 << 14
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Exported:
    """An export that was loaded: the model in evaluation mode, and what is known of it."""

    loaded: LoadedModel
    recipe: Recipe
    about: Manifest
    folder: Path


def find_export(path: Path) -> Path:
    """The exported folder of a run, or ``path`` itself where it is one; raises RunError otherwise."""
    if not path.is_dir():
        raise RunError(f"{path}: there is no such folder; expected a run, or its adapter/ or model/")
    for folder in (path, path / "adapter", path / "model"):
        if (folder / manifest.FILE).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise RunError(f"{path}: this run has not finished, so there is nothing to load; go on with --resume {path}")
    if (path / ADAPTER_CONFIG).is_file():
        raise RunError(f"{path}: an adapter that peftkit did not write; load it with peft.PeftModel.from_pretrained")
    raise RunError(f"{path}: not a run of peftkit: neither it nor adapter/ or model/ in it holds {manifest.FILE}")


def load_exported(
    path: str | Path, *, device: str | None = None, dtype: str | None = None, quantized: bool = True
) -> Exported:
    """Loads a run's export.

    Args:
        path: a run's folder, or an exported folder.
        device: where to; None takes CUDA where there is one.
        dtype: of frozen weights and products, in place of the recipe's.
        quantized: False holds a quantized recipe's base unquantized.

    Raises:
        RunError: not a finished run of peftkit.
        ModelError: pickled or damaged weights, another base than the one trained on, or a head that does not fit.
    """
    import torch

    folder = find_export(Path(path))
    about = manifest.read(folder)
    refuse_pickles(folder)
    if about.saves == "onnx":
        from peftkit.export.onnx import load_onnx

        return load_onnx(folder, about, Recipe.from_yaml(folder / "recipe.yaml"), tokenizer_in(folder))
    recipe = _recipe(folder, about, dtype, quantized)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = tokenizer_in(folder)
    loaded = load_base(recipe, about.info, tokenizer, device)
    loaded.pooling = about.pooling  # type: ignore[assignment]
    if about.saves == "adapter":
        _check_base(loaded, about)
        names = check_head(folder / ADAPTER_WEIGHTS, about)
        if own_format.is_delta(folder):
            check_adapter_config(folder)
            own_format.put_on(loaded.model.requires_grad_(False), folder)
            for name in names:
                loaded.model.get_parameter(name).requires_grad_(True)
        else:
            loaded.model = _with_adapter(loaded.model, folder, names)
            mark_adapter(loaded.model, "default")
    else:
        recipe.method.apply(loaded)  # tells what was trained, hence held in fp32
    cast_parameters(loaded.model, dtypes.dtype_for(recipe.model, device))
    loaded.model.requires_grad_(False).eval()
    if about.head.pools and about.pooling == "own":
        first_token.shorten_last_block(loaded.model)
    return Exported(loaded, recipe, about, folder)


def refuse_pickles(folder: Path) -> None:
    """Raises ModelError where a folder holds weights that could run code."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"{folder}: holds {', '.join(pickled)}, which peftkit never writes and which can run code when opened; "
            "remove it, or export the run again"
        )


def check_head(weights: Path, about: Manifest) -> list[str]:
    """Names of the adapter's weights; raises ModelError when they cannot be read or the head has other labels."""
    if not weights.is_file():
        raise ModelError(f"{weights.parent}: expected {weights.name}, found none; export the run again")
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights}: not a readable safetensors file ({error}); export the run again") from None
    if not about.heads:
        return names
    rows = {
        shape[0] for name, shape in shapes.items() if len(shape) == 2 and about.heads[-1] in name.split(".")
    }  # fmt: skip
    expected = about.head.width
    if expected not in rows:
        raise ModelError(
            f"{weights}: expected a head for {expected} labels ({', '.join(about.info.labels[:6])}), found "
            f"{', '.join(map(str, sorted(rows))) or 'none'}: {manifest.FILE} and weights do not belong together"
        )
    return names


def _recipe(folder: Path, about: Manifest, dtype: str | None, quantized: bool) -> Recipe:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    changes: dict[str, Any] = {"model": {"pooling": about.pooling}}
    if dtype is not None:
        changes["model"]["dtype"] = dtype
    if about.saves == "model":
        changes["model"] |= {"source": str(folder.resolve()), "revision": None}
        if recipe.method.saves == "adapter":
            changes["method"] = {"kind": "full"}  # merged, it is a whole model
        quantized = False
    else:
        changes["model"]["source"] = _source(recipe.model.source, about)
        changes["model"]["revision"] = about.revision or recipe.model.revision
    if not quantized:
        if about.saves == "adapter" and about.quantization and about.quantization["kind"] in KERNELS:
            raise ModelError(
                f"{folder}: its base is a checkpoint quantized with {about.quantization['kind']}, of which there is no "
                "whole form to hold, or to merge into"
            )
        changes["quantization"] = None
    return replace(recipe, **changes)


def _source(source: str, about: Manifest) -> str:
    """A relative folder of the recipe is looked for where training found it, when it is not here."""
    is_path = source.startswith((".", "/", "~")) or source.endswith(".gguf")
    if is_path and not Path(source).expanduser().exists() and Path(about.base).is_dir():
        return about.base
    return source


def _check_base(loaded: LoadedModel, about: Manifest) -> None:
    if loaded.fingerprint != about.fingerprint:
        raise ModelError(
            f"this adapter was trained on {about.source} (fingerprint {about.fingerprint[:12]}), and the base found at "
            f"{loaded.model.name_or_path} is another one ({loaded.fingerprint[:12]}): its files have changed, or "
            "recipe.yaml in the export names another model"
        )


def _with_adapter(base: Any, folder: Path, names: list[str]) -> Any:
    """peft's own loading, as a fresh process would do it; what it only warns of is an error here."""
    from peft import PeftModel

    check_rank(folder, check_adapter_config(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are looked for below
            model = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        # odd values in a stranger's config break peft in as many ways as there are values
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: the adapter does not fit its base: {first[:300]}") from error
    check_same_names(model, folder, names, "default")
    return model


def check_rank(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelError where a config asks for larger matrices than the weights hold: memory taken for nothing."""
    if config.get("peft_type") != "LORA":
        return
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        ranks = [file.get_slice(name).get_shape()[0] for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
    if not ranks:
        return
    pattern = config.get("rank_pattern") or {}
    wanted = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ["no mapping"])]
    largest = max(ranks) if len(wanted) == 1 else MAX_RANK  # where every layer has its own, r itself may be of none
    for rank in wanted:
        if not isinstance(rank, int) or not 0 < rank <= largest:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG}: rank {rank!r:.40}, and the weights' largest is {max(ranks)}: "
                "they do not belong together"
            )


def mark_adapter(model: Any, adapter: str) -> None:
    """Calls an adapter's weights trained, so that they are held in fp32, as they were trained and saved."""
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter.requires_grad_(True)


def check_same_names(model: Any, folder: Path, names: list[str], adapter: str) -> None:
    """Raises ModelError unless the weights in the folder are those that the adapter in the model is made of."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    found = set(names)
    if expected != found:
        lost, strange = sorted(expected - found), sorted(found - expected)
        said = f"lacks {len(lost)} weights, such as {lost[0]}" if lost else f"holds {strange[0]}, which nothing takes"
        raise ModelError(f"{folder}: {ADAPTER_WEIGHTS} {said}: it and {ADAPTER_CONFIG} do not belong together")


def check_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dict; raises ModelError when it is missing, no JSON, or names files outside."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: expected {ADAPTER_CONFIG}, found none; export the run again")
    values = read_json(file)
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ModelError(f"{file}: expected peft's adapter configuration, found no peft_type in it")
    if values.get("auto_mapping"):
        raise ModelError(f"{file}: auto_mapping names a class to be imported, which is never done; remove it")
    check_config(folder)
    return values
