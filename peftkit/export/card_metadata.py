"""The metadata of a model card, from which the hub lists and links a model: base, data sets, results, license.

https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.source import kind_of
from peftkit.errors import RecipeError, did_you_mean
from peftkit.export.manifest import Manifest
from peftkit.schema.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FENCE = "---\n"
SPLITS = ("test", "validation")
"""Splits whose metrics are results, the first that was scored."""
LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr "
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl mulanpsl-2.0 ncsa odbl odc-by ofl-1.1 "
    "open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib".split()
)
"""Identifiers of https://huggingface.co/docs/hub/repositories-licenses."""


def check_license(name: str | None, *, private: bool) -> None:
    """Raises RecipeError for a license that the hub does not know, or for none where others will see the model."""
    if name is None and not private:
        raise RecipeError(
            "--license: expected the license under which others may use the model, such as apache-2.0 or mit, found "
            "none; `--license unknown` leaves it open, and --private needs none"
        )
    if name is not None and name not in LICENSES:
        raise RecipeError(
            f"--license: expected an identifier of https://huggingface.co/docs/hub/repositories-licenses, or other, "
            f"found '{name}': {did_you_mean(name.lower(), LICENSES)}"
        )


def front_matter(
    manifest: Manifest,
    recipe: Recipe,
    metrics: Mapping[str, Mapping[str, Any]],
    library: str,
    license: str | None = None,
) -> str:
    """The YAML between the fences of a card.

    Args:
        metrics: by split, as in metrics.json; the numbers of the test split, or else of validation, are results.
        library: what loads the model, as the hub calls it.
    """
    from huggingface_hub import ModelCardData

    sources = [recipe.data.source] if isinstance(recipe.data.source, str) else list(recipe.data.source)
    results = _results(manifest, sources, metrics)
    base = None if Path(manifest.base).is_absolute() else manifest.base
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base and manifest.saves == "adapter" else {}
    data = ModelCardData(
        base_model=base,
        datasets=[name for name in sources if _is_hub_dataset(name)] or None,
        eval_results=results or None,
        library_name=library,
        license=license,
        metrics=[result.metric_type for result in results] or None,
        model_name=manifest.recipe if results else None,
        pipeline_tag=manifest.head.pipeline_tag,
        tags=["peftkit", manifest.method],
        **relation,
    )
    return str(data.to_yaml(line_break="\n")) + "\n"


def with_front_matter(card: str, metadata: str) -> str:
    """A card with this metadata in place of its own."""
    body = card
    if card.startswith(FENCE) and FENCE in card[len(FENCE) :]:
        body = card.split(FENCE, 2)[2]
    return f"{FENCE}{metadata}{FENCE}{body}"


def _is_hub_dataset(name: str) -> bool:
    kind = kind_of(name)
    return kind is not None and kind.on_hub


def _results(manifest: Manifest, sources: list[str], metrics: Mapping[str, Mapping[str, Any]]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    split = next((name for name in SPLITS if name in metrics), None)
    if split is None:
        return []
    names = [name if _is_hub_dataset(name) else Path(name).name for name in sources]
    numbers = {
        name: float(value)
        for name, value in metrics[split].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    return [
        EvalResult(
            task_type=manifest.head.pipeline_tag, dataset_type=names[0], dataset_name=", ".join(names),
            dataset_split=split, metric_type=name, metric_value=value, metric_name=name.replace("_", " "),
        )
        for name, value in numbers.items()
    ]  # fmt: skip
