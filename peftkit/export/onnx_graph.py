"""Tracing a model that scores or embeds texts into an ONNX file, and running that file in its place."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from peftkit.errors import ModelError
from peftkit.export.folder import ExportFolder
from peftkit.export.loading import load_exported
from peftkit.export.merging import MergeMode, MergeState
from peftkit.export.proof import SAMPLE, Proof, compare_logits
from peftkit.export.proof import TEXTS as PROOF_TEXTS
from peftkit.models import pooled_logits
from peftkit.models.blocks import unwrap
from peftkit.models.kernels.first_token import reading_first_token

TEXTS = [*PROOF_TEXTS, "a market of stock and oil"]
"""Texts of the proof: other numbers and lengths than those traced."""
UNLIMITED = 10**9
"""What a tokenizer without a limit says is its limit, at least."""


class TextGraph(nn.Module):
    """What is traced: the model, its adapter, and the pooling of its tokens; ``output`` is a head's ``onnx_output``."""

    def __init__(self, model: Any, output: str, pooling: str, pairs: bool) -> None:
        super().__init__()
        self.model, self.output, self.pooling, self.pairs = model, output, pooling, pairs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        if self.output == "vectors":
            hidden = self.model(**pooled_logits.model_inputs(self.model, batch)).last_hidden_state
            return pooled_logits.pool(hidden, attention_mask, self.pooling)
        with reading_first_token() if self.pooling == "own" else contextlib.nullcontext():
            return pooled_logits.plain_logits(self.model, batch, self.pooling)

    def inputs(self, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
        """A batch of texts, as pairs with each other where the model reads pairs."""
        second = [texts[::-1]] if self.pairs else []
        truncation = tokenizer.model_max_length < UNLIMITED
        encoded = tokenizer(texts, *second, padding=True, truncation=truncation, return_tensors="pt")
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if self.pairs else []))
        return {name: encoded[name] for name in names if name in encoded}


class OnnxModel(nn.Module):
    """An ONNX file in the place of a transformers model: called with a batch, it returns ``logits`` or ``vectors``."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.config = AutoConfig.from_pretrained(file.parent)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [argument.name for argument in self._session.get_inputs()]
        self.output = self._session.get_outputs()[0].name
        self.placeholder = nn.Parameter(torch.zeros(()), requires_grad=False)
        """Lets callers read a device off the parameters."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """``SimpleNamespace(logits=[rows, labels])``, or ``vectors`` [rows, width]."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        inputs = {name: batch[name].cpu().numpy() for name in self._names}
        return SimpleNamespace(**{self.output: torch.from_numpy(self._session.run([self.output], inputs)[0])})


@dataclass(frozen=True)
class Reference:
    """Batches that were not traced, and torch's logits or vectors of them with base and adapter unmerged."""

    batches: list[dict[str, Tensor]]
    outputs: Tensor

    def prove(self, file: Path, tolerance: float, dtype: str) -> Proof:
        """Compares ONNX Runtime's logits or vectors with torch's."""
        model = OnnxModel(file)
        exported = torch.cat([of_real_tokens(getattr(model(**batch), model.output), batch) for batch in self.batches])
        rows = sum(len(batch["input_ids"]) for batch in self.batches)
        return compare_logits(exported, self.outputs, tolerance, rows=rows, dtype=dtype)


def of_real_tokens(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Logits [rows, labels] and vectors as they are, and logits by token, [rows, tokens, labels], without padding."""
    return logits if logits.dim() == 2 else logits[batch["attention_mask"].bool()]


def write_model(source: ExportFolder, file: Path, merge: MergeMode, traced: Path | None = None) -> Reference:
    """Writes the ONNX file, and config and tokenizer next to it; ``traced``: of the same model, to be copied.

    Raises:
        MethodError: the adapter cannot be merged, and ``merge`` is True.
        ModelError: the model cannot be traced.
    """
    load = functools.partial(load_exported, source, device="cpu", dtype="float32", quantized=False)
    loaded = load().loaded
    head = source.manifest.head
    pairs = source.recipe.data.text_pair is not None and not head.embeds
    graph = TextGraph(loaded.model, head.onnx_output, source.manifest.pooling, pairs).eval()
    batches = [graph.inputs(loaded.tokenizer, texts) for texts in (TEXTS, TEXTS[:1])]
    with torch.no_grad():
        reference = Reference(batches, torch.cat([of_real_tokens(graph(**batch), batch) for batch in batches]))
    if traced is not None:
        shutil.copyfile(traced, file)
    else:
        state = MergeState(merge)
        if state.is_pending(loaded.model):
            graph.model = state.merge(loaded.model, quantized=False, reload=lambda: load().model)
        _trace(graph, graph.inputs(loaded.tokenizer, [SAMPLE, "?"]), file)
    unwrap(graph.model).config.save_pretrained(file.parent)
    loaded.tokenizer.save_pretrained(file.parent)
    return reference


def _trace(graph: TextGraph, inputs: dict[str, Tensor], file: Path) -> None:
    """Traces the graph for any number of rows and tokens; hides what the exporter prints."""
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    try:
        # of torchvision, which is optional
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph, tuple(inputs.values()), str(file), input_names=list(inputs), output_names=[graph.output],
                dynamo=True, external_data=False, dynamic_shapes={name: {0: rows, 1: tokens} for name in inputs},
            )  # fmt: skip
    except Exception as error:  # a tracer fails in many ways on an architecture that it does not know
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"this model cannot be written as ONNX: {first[:300]}") from error
