"""A classifier as an ONNX file: base, adapter and pooling in one graph, for runtimes without torch.

    FOLDER/  model.onnx  config.json  tokenizer…  peftkit.json  recipe.yaml  metrics.json  proof.json  README.md

Inputs are ``input_ids`` and ``attention_mask`` (``token_type_ids`` where texts come in pairs), [rows, tokens] of any
size; the output is ``logits`` [rows, labels] in fp32. An adapter is merged into the base first, in fp32, where its
method can be. ONNX Runtime must give the logits of base and adapter apart, by torch, or nothing is written; in INT8
they may differ more (INT8_TOLERANCE), and how well that file does, `peftkit evaluate FOLDER` tells.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ExportError, MethodError, ModelError
from peftkit.export import card, manifest, onnx_int8
from peftkit.export.in_memory import Merge, Merging, merge_in_memory
from peftkit.export.manifest import Manifest
from peftkit.models import classifier
from peftkit.models.blocks import unwrap
from peftkit.models.kernels.first_token import reading_first_token
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel
from peftkit.system.files import atomic_folder

FILE = "model.onnx"
WRITE, READ = ("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",)
KIND = "onnx"
SAMPLE = "The quick brown fox jumps over the lazy dog."
TEXTS = [SAMPLE, SAMPLE.upper(), f"{SAMPLE} {SAMPLE}", "?", "a market of stock and oil"]
"""On which the file is proven."""
INT8_TOLERANCE = 0.5
"""As ``export.tolerance``, for weights in INT8: more is a file that went wrong, not rounding."""


def export_onnx(folder: Path, target: Path, *, tolerance: float, merge: Merge = "auto", int8: bool = False) -> Path:
    """Writes an exported run's ONNX file to ``target``.

    Args:
        merge: True insists on merging the adapter into the base; "auto" merges where that can be done.
        int8: hold the weights in 8 bits; the fp32 file is proven first.

    Raises:
        MethodError: a language model, or one that cannot be merged where that was insisted on.
        ModelError: the packages for it are not installed, or the model cannot be traced.
        ExportError: ONNX Runtime's logits are not torch's.
    """
    about = manifest.read(folder)
    if not about.head.onnx:
        raise MethodError("ONNX is written for classifiers; a language model is exported as a plain model: --merge")
    need(WRITE)
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    loaded = _load(folder)
    graph = _Graph(loaded.model, about.pooling, recipe.data.text_pair is not None).eval()
    rows = [_inputs(loaded.tokenizer, texts, graph.pairs) for texts in (TEXTS, TEXTS[:1])]
    with torch.no_grad():
        known = torch.cat([graph(**inputs) for inputs in rows])
    graph.model = _merged(loaded.model, folder, merge)
    with atomic_folder(target) as stage:
        _write(graph, _inputs(loaded.tokenizer, [SAMPLE, "?"], graph.pairs), stage / FILE)
        unwrap(graph.model).config.save_pretrained(stage)
        loaded.tokenizer.save_pretrained(stage)
        about = replace(about, saves=KIND, quantization=None, dtype="int8" if int8 else "float32")
        manifest.write(stage, about)
        for name in ("recipe.yaml", "metrics.json"):
            shutil.copy2(folder / name, stage / name)
        _prove(stage, rows, known, tolerance)
        if int8:
            onnx_int8.quantize(stage / FILE)
            _prove(stage, rows, known, INT8_TOLERANCE, "int8")
        card.write(stage, about, recipe, json.loads((stage / "metrics.json").read_text(encoding="utf-8")))
    return target


def _load(folder: Path) -> LoadedModel:
    """Base and adapter in fp32, unquantized, on the CPU."""
    from peftkit.export.loading import load_exported

    return load_exported(folder, device="cpu", dtype="float32", quantized=False).loaded


def _merged(model: Any, folder: Path, merge: Merge) -> Any:
    """The model with its adapter merged; as it is where there is none, or none that can be merged."""
    merging = Merging(merge)
    if not merging.due(model):
        return model
    merging.check(model, quantized=False)
    if merging.reason:
        return model
    try:
        return merge_in_memory(model)[0]
    except MethodError as error:
        merging.refuse(str(error))
        return _load(folder).model


class OnnxClassifier(nn.Module):
    """An ONNX file in the place of a transformers classifier: called with a batch, it gives ``logits``."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        need(READ)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        """Tells the device."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """``SimpleNamespace(logits=[rows, labels])``."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        inputs = {name: given[name].cpu().numpy() for name in self._names}
        return SimpleNamespace(logits=torch.from_numpy(self._session.run(["logits"], inputs)[0]))


class _Graph(nn.Module):
    """What is traced: the model, its adapter, and the pooling of its tokens."""

    def __init__(self, model: Any, pooling: str, pairs: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.pairs = model, pooling, pairs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        if self.pooling == "own":
            with reading_first_token():
                return classifier.plain_logits(self.model, batch, self.pooling)
        if self.pooling == "mean":
            return classifier.plain_logits(self.model, batch, self.pooling)
        # an index of rows would be traced as a constant
        scores = classifier.plain_logits(self.model, batch, "own")
        first = attention_mask.argmax(1)[:, None, None].expand(-1, 1, scores.shape[-1])
        return scores.gather(1, first)[:, 0]


def need(packages: tuple[str, ...]) -> None:
    """Raises ModelError with the line that installs what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX needs {', '.join(missing)}; run `pip install {' '.join(missing)}`")


def _inputs(tokenizer: Any, texts: list[str], pairs: bool) -> dict[str, Tensor]:
    second = [texts[::-1]] if pairs else []
    encoded = tokenizer(texts, *second, padding=True, return_tensors="pt")
    wanted = ("input_ids", "attention_mask", *(["token_type_ids"] if pairs else []))
    return {name: encoded[name] for name in wanted if name in encoded}


def _write(graph: _Graph, inputs: dict[str, Tensor], file: Path) -> None:
    """Traces the graph for any number of rows and tokens; the exporter's chatter is kept back."""
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph, tuple(inputs.values()), str(file), input_names=list(inputs), output_names=["logits"],
                dynamo=True, external_data=False, dynamic_shapes={name: {0: rows, 1: tokens} for name in inputs},
            )  # fmt: skip
    except Exception as error:  # whatever a tracer finds in an architecture that it does not know
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"this model cannot be written as ONNX: {first[:300]}") from error


def _prove(stage: Path, rows: list[dict[str, Tensor]], known: Tensor, tolerance: float, dtype: str = "float32") -> None:
    """Other rows and lengths than those traced, padded and not, against torch's logits of them."""
    runtime = OnnxClassifier(stage / FILE)
    found = torch.cat([runtime(**inputs).logits for inputs in rows]).double()
    known = known.double()
    difference, spread = float((known - found).abs().max()), max(float(known.std(correction=0)), 1e-12)
    figures = {
        "passed": difference / spread <= tolerance, "relative": difference / spread, "tolerance": tolerance,
        "largest_difference": difference, "spread": spread, "rows": len(known), "logits": known.numel(),
        "same_choice": float((known.argmax(-1) == found.argmax(-1)).double().mean()),
        "dtype": dtype, "device": "cpu",
    }  # fmt: skip
    (stage / "proof.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not figures["passed"]:
        raise ExportError(
            f"ONNX Runtime's {dtype} logits differ from torch's by {difference / spread:.2g} of their spread; "
            f"{'export.tolerance allows ' if dtype == 'float32' else 'allowed are '}{tolerance:g}"
        )


def load_onnx(folder: Path, about: Manifest, recipe: Any, tokenizer: Any) -> Any:
    """An exported ONNX folder as ``load_exported`` gives other exports."""
    from peftkit.export.loading import Exported

    model = OnnxClassifier(folder / FILE).eval()
    return Exported(LoadedModel(model, tokenizer, "own", about.heads, about.fingerprint), recipe, about, folder)
