"""The model card: what was trained, on what, how well it does, how far to trust it, and the code that loads it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from peftkit.export import proof
from peftkit.export.card_metadata import front_matter
from peftkit.export.manifest import Manifest
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS
from peftkit.system.versions import version

FILE = "README.md"
SOFTWARE = ("peftkit", "torch", "transformers", "peft")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
PEFTKIT = ["import peftkit", "", 'model = peftkit.load("path/to/this/folder")  # model.model is the torch module']
LOAD_FILE = "from safetensors.torch import load_file"
LOAD_TENSORS = [
    'base.load_state_dict(load_file(f"{folder}/adapter_model.safetensors"), strict=False)  # biases and head',
    "model = base.eval()",
]
CAST_CHECKPOINT = [
    "for parameter in base.parameters():",
    "    data = parameter.data",
    '    if parameter.is_floating_point() and type(data) is torch.Tensor and not hasattr(parameter, "quant_state"):',
    "        parameter.data = data.float()",
]
"""transformers leaves some unquantized weights of a quantized checkpoint in the dtype of their file."""


@dataclass(frozen=True)
class Usage:
    """How an export is loaded without peftkit."""

    reader: str
    """What ``code`` needs, as in "With peft and transformers alone"; the first word is the ``library``."""
    code: str
    """Python that loads the folder and gives logits, pooling included, or a generated text."""
    loaded_by: str
    """What loaded the export for its proof, at the beginning of a sentence."""
    limits: tuple[str, ...] = ()
    """What users should know about the format."""
    loads_in_peftkit: bool = True
    """Whether ``peftkit.load`` loads it."""

    @property
    def library(self) -> str:
        """The hub's ``library_name``."""
        return self.reader.split()[0]


def usage(manifest: Manifest) -> Usage:
    """How an export is loaded: by peft or transformers, or by peftkit where they lack the format."""
    adapter = manifest.saves == "adapter"
    loads_with = "transformers" if manifest.saves == "model" else "peftkit"
    if adapter:
        loads_with = METHODS.get(manifest.method).loads_with
    reader = {"peft": "peft and transformers alone", "transformers": "transformers alone"}.get(loads_with, loads_with)
    if loads_with == "peftkit":
        other, code = "any other is refused", [*PEFTKIT, *manifest.head.peftkit_code()]
    else:
        other = f"{loads_with} may load it on another without a warning, and its answers would be wrong"
        code = _transformers_code(manifest, loads_with)
    limits = (f"It fits only the base named above: {other}.",) if adapter else ()
    return Usage(reader, "\n".join(code), f"In a fresh process, {reader.replace(' alone', '')}", limits)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def write(
    folder: Path, manifest: Manifest, recipe: Recipe, metrics: Mapping[str, Mapping[str, Any]], usage: Usage
) -> None:
    """Writes README.md into an exported folder; reads the proof from it."""
    method = recipe.method.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    source, local_base = recipe.data.source, Path(manifest.base).is_absolute()
    columns, results = _results(metrics)
    text = _template().render(
        columns=columns,
        learning_rate=recipe.learning_rate,
        local_base=local_base,
        machine=f"Python {platform.python_version()}, {platform.machine()}",
        manifest=manifest,
        metadata=front_matter(manifest, recipe, metrics, usage.library),
        options=", ".join(f"{name} {value}" for name, value in method.items()),
        proof=proof.read(folder),
        results=results,
        software=", ".join(f"{name} {version(name)}" for name in SOFTWARE),
        sources=source if isinstance(source, str) else ", ".join(source),
        training=recipe.training,
        usage=usage,
    )
    (folder / FILE).write_text(text, encoding="utf-8")


def _transformers_code(manifest: Manifest, loads_with: str) -> list[str]:
    auto, adapter = manifest.auto_class, manifest.saves == "adapter"
    names = sorted(["AutoTokenizer", auto, *(["AutoConfig"] if adapter else [])])
    lines = ["import torch", f"from transformers import {', '.join(names)}", "", 'folder = "path/to/this/folder"']
    if adapter:
        lines.insert(1, "from peft import PeftModel" if loads_with == "peft" else LOAD_FILE)
        revision = f", revision={manifest.revision!r}" if manifest.revision else ""
        lines += [
            "config = AutoConfig.from_pretrained(folder)",
            f"base = {auto}.from_pretrained({manifest.base!r}{revision}, config=config, dtype=torch.float32)",
            *(CAST_CHECKPOINT if (manifest.quantization or {}).get("kind") in KERNELS else []),
            *(["model = PeftModel.from_pretrained(base, folder).eval()"] if loads_with == "peft" else LOAD_TENSORS),
        ]
    else:
        lines.append(f"model = {auto}.from_pretrained(folder, dtype=torch.float32).eval()")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    return [*lines, *manifest.head.usage_code(manifest.pooling, manifest.max_length)]


def _results(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns: the metrics that any split has; rows: the splits."""
    numbers = {
        split: {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, (int, float))}
        for split, values in metrics.items()
        if isinstance(values, Mapping)
    }
    columns = list(dict.fromkeys(name for values in numbers.values() for name in values))[:8]
    rows = [(split, [values.get(name, "") for name in columns]) for split, values in numbers.items()]
    return columns, [(split, cells) for split, cells in rows if any(cells)]
