"""The model card: what was trained, on what, how well it does, how far to trust it, and the code that loads it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from peftkit.export import proof
from peftkit.export.manifest import Manifest
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.schema.recipe import Recipe

FILE, ONNX = "README.md", "onnx"
SOFTWARE = ("peftkit", "torch", "transformers", "peft")

TEMPLATE = """\
---
{{ metadata }}
---
# {{ about.recipe }}

{{ opening }}

## Use

With {{ reader }}{{ local_base }}:

```python
{{ code }}
```

With peftkit: `peftkit.load("this folder").{{ use }}(["a text"])`.
{% if about.labels %}
Labels, in the order of the logits: {{ about.labels | join(", ") }}.
{% endif %}
## Training
| | |
|---|---|
{% for name, value in training -%}
| {{ name }} | {{ value }} |
{% endfor %}
The whole recipe is in `recipe.yaml`.

## Results
{% if results -%}
| split | {{ columns | join(" | ") }} |
|---|{{ "---|" * columns | length }}
{% for split, values in results -%}
| {{ split }} | {{ values | join(" | ") }} |
{% endfor %}
{%- else -%}
No figures were recorded.
{% endif %}
## Proof
{% if proof -%}
{{ loaded_by }} loaded this \
folder and gave the logits of the trained model on {{ proof.rows }} rows ({{ proof.logits }} logits, \
{{ proof.dtype }}, {{ proof.device }}). The largest difference was {{ "%.2g" | format(proof.relative) }} of the \
logits' standard deviation, where {{ "%g" | format(proof.tolerance) }} was allowed, and the likeliest answer was the \
same in {{ "%.1f" | format(100 * proof.same_choice) }} % of them.
{%- else -%}
None was made (`export.prove` was off).
{%- endif %}

## Limits
{% for limit in limits -%}
- {{ limit }}
{% endfor %}"""


def write(folder: Path, about: Manifest, recipe: Recipe, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes README.md into an exported folder; the proof's figures are read from it."""
    (folder / FILE).write_text(render(folder, about, recipe, metrics), encoding="utf-8")


def render(folder: Path, about: Manifest, recipe: Recipe, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The card as Markdown."""
    environment = jinja2.Environment(autoescape=False, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    columns, results = _results(metrics)
    return environment.from_string(TEMPLATE).render(
        about={"recipe": about.recipe, "saves": about.saves, "labels": about.info.labels},
        use="generate" if about.head.writes_text else "predict",
        code=code(about),
        columns=columns,
        limits=_limits(about, recipe),
        loaded_by="ONNX Runtime"
        if about.saves == ONNX
        else f"In a fresh process, {_reader(about).replace(' alone', '')}",
        local_base=" (the base lies where it was trained)" if _is_local(about) else "",
        metadata=_metadata(about),
        opening=_opening(about, recipe),
        proof=proof.read(folder),
        reader=_reader(about),
        results=results,
        training=_training(about, recipe),
    )


def code(about: Manifest) -> str:
    """Python that loads the export without peftkit and gives logits, pooling included."""
    if _reader(about) == "peftkit":
        return _peftkit_code(about)
    if about.saves == ONNX:
        return "\n".join(_onnx_code(about))
    auto = about.auto_class
    names = ["AutoTokenizer", auto] + (["AutoConfig"] if about.saves == "adapter" else [])
    lines = ["import torch", f"from transformers import {', '.join(sorted(names))}", ""]
    if about.saves == "adapter":
        biases = about.method == "bitfit"
        lines.insert(1, "from safetensors.torch import load_file" if biases else "from peft import PeftModel")
        revision = f", revision={about.revision!r}" if about.revision else ""
        lines += [
            'folder = "path/to/this/folder"',
            "config = AutoConfig.from_pretrained(folder)",
            f"base = {auto}.from_pretrained({about.base!r}{revision}, config=config, dtype=torch.float32)",
            *(_whole_weights_code() if (about.quantization or {}).get("kind") in KERNELS else []),
            *(_bias_code() if biases else ["model = PeftModel.from_pretrained(base, folder).eval()"]),
        ]
    else:
        lines += [
            'folder = "path/to/this/folder"',
            f"model = {auto}.from_pretrained(folder, dtype=torch.float32).eval()",
        ]
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    return "\n".join([*lines, *about.head.usage_code(about.pooling, about.max_length)])


def _reader(about: Manifest) -> str:
    """What the lines under "Use" need: peft has no format for bottleneck adapters, and biases need none."""
    if about.saves == ONNX:
        return "onnxruntime and transformers' tokenizer"
    if about.saves == "adapter" and about.method == "bottleneck":
        return "peftkit"
    if about.saves == "adapter" and about.method != "bitfit":
        return "peft and transformers alone"
    return "transformers alone"


def _is_local(about: Manifest) -> bool:
    return about.saves == "adapter" and Path(about.base).is_absolute()


def _peftkit_code(about: Manifest) -> str:
    load = ["import peftkit", "", 'model = peftkit.load("path/to/this/folder")  # model.model is the torch module']
    return "\n".join([*load, *about.head.peftkit_code()])


def _onnx_code(about: Manifest) -> list[str]:
    return [
        "import numpy as np",
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "inputs = tokenizer(",
        f'    ["a text", "another text"], truncation=True, max_length={about.max_length}, padding=True, '
        'return_tensors="np"',
        ")",
        "names = [given.name for given in session.get_inputs()]",
        '(logits,) = session.run(["logits"], {name: inputs[name].astype(np.int64) for name in names})',
        *about.head.onnx_code(),
    ]


def _bias_code() -> list[str]:
    return [
        'base.load_state_dict(load_file(f"{folder}/adapter_model.safetensors"), strict=False)  # biases and head',
        "model = base.eval()",
    ]


def _whole_weights_code() -> list[str]:
    """transformers leaves some of a quantized checkpoint's whole weights in the dtype of its files."""
    return [
        "for held in base.parameters():",
        '    if held.is_floating_point() and type(held.data) is torch.Tensor and not hasattr(held, "quant_state"):',
        "        held.data = held.data.float()",
    ]


def _metadata(about: Manifest) -> str:
    """The hub's front matter; JSON is YAML, and leaves nothing to quote by hand."""
    values: dict[str, Any] = {
        "library_name": _reader(about).split()[0],
        "pipeline_tag": about.head.pipeline_tag,
        "tags": ["peftkit", about.method],
    }
    if not Path(about.base).is_absolute():
        values = {"base_model": about.base, **values}
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def _opening(about: Manifest, recipe: Recipe) -> str:
    sources = recipe.data.source if isinstance(recipe.data.source, str) else ", ".join(recipe.data.source)
    what = about.head.summary()
    return f"Finetuned from `{about.source}` with `{about.method}` on `{sources}`. It {what}."


def _training(about: Manifest, recipe: Recipe) -> list[tuple[str, Any]]:
    method = recipe.method.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    options = ", ".join(f"{name} {value}" for name, value in method.items())
    size = (
        f"{recipe.training.batch_tokens} tokens"
        if recipe.training.batch_tokens
        else f"{recipe.training.batch_size} rows"
    )
    rows: list[tuple[str, Any]] = [
        ("base", f"`{about.base}`" + (f" at `{about.revision}`" if about.revision else "")),
        ("fingerprint of the base", f"`{about.fingerprint}`"),
        ("method", about.method + (f" ({options})" if options else "")),
        ("pooling", about.pooling) if about.heads else ("head", "the base's own"),
        ("epochs", f"{recipe.training.epochs:g}"),
        ("batch", size),
        ("learning rate", f"{recipe.learning_rate:g}, {recipe.training.scheduler}"),
        ("longest row", f"{about.max_length} tokens"),
        ("seed", recipe.training.seed),
        ("dtype of frozen weights", about.dtype if about.quantization is None else about.quantization["kind"]),
        ("software", ", ".join(f"{name} {version(name)}" for name in SOFTWARE)),
        ("machine", f"Python {platform.python_version()}, {platform.machine()}"),
    ]
    return rows


def _results(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns are the figures that any split has; rows are the splits."""
    splits = {name: values for name, values in metrics.items() if isinstance(values, Mapping)}
    numbers = {
        split: {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for split, values in splits.items()
    }
    columns = list(dict.fromkeys(name for values in numbers.values() for name in values))[:8]
    rows = [
        (split, [f"{values[name]:.4g}" if name in values else "" for name in columns])
        for split, values in numbers.items()
        if any(name in values for name in columns)
    ]
    return columns, rows


def _limits(about: Manifest, recipe: Recipe) -> list[str]:
    limits = [
        f"Texts were cut after {about.max_length} tokens in training; longer ones are cut in `predict`, too.",
        "The figures hold for texts like those of the data set; nothing was tested on others.",
        "What the base model learned before, its errors and biases among it, is still there.",
    ]
    if about.saves == ONNX and about.dtype == "int8":
        limits.append("Weights and activations are rounded to 8 bits: some answers differ from the trained model's.")
    if about.quantization is not None:
        limits.append(
            f"It was trained on a base held in {about.quantization['kind']}; on the unquantized base its logits differ "
            "a little."
        )
    if about.saves == "adapter":
        reader = _reader(about).split()[0]
        otherwise = f"on any other, {reader} may load it without a word and be wrong"
        limits.append(
            f"It fits the one base named above: {'any other is refused' if reader == 'peftkit' else otherwise}."
        )
    return limits
