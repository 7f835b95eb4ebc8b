"""Texts as vectors: the pooled hidden states of a finetuned model, or of a base model.

The pooling is the model's own: the run's, or that of a sentence encoder's 1_Pooling/config.json (Reimers & Gurevych
2019, arXiv:1908.10084), else the mean of an encoder's tokens and the last token of a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import by_length, collate, pass_tokens
from peftkit.errors import ModelError, RunError
from peftkit.export.loading import LoadedExport
from peftkit.inference.texts import Text, as_texts
from peftkit.models import dtypes, pooled_logits
from peftkit.models.architectures import check_pools, reads_padding
from peftkit.models.blocks import text_encoder, unwrap
from peftkit.models.context import usable_length
from peftkit.models.loading import sentence_pooling, writes_text
from peftkit.models.sources import folder_of, resolve
from peftkit.models.third_party import silence_libraries
from peftkit.schema.recipe import ModelConfig, TrainingConfig


@dataclass(frozen=True)
class Embedder:
    """A model without its head, and how texts are fed to it."""

    model: Any
    """The transformers backbone, adapters in place; of an encoder–decoder, its encoder."""
    tokenizer: Any
    pooling: str
    """mean, cls or last; own for an ONNX file of vectors, which pools by itself."""
    max_length: int
    dtype: torch.dtype
    """Of the matmuls."""
    tokens: int
    """Padded tokens per batch: the run's ``training.micro_batch_tokens``, or the device's default."""

    @torch.no_grad()
    def embed(
        self, texts: Text | Sequence[Text], *, normalize: bool = False, batch_size: int | None = None
    ) -> np.ndarray:
        """Vectors [texts, width] fp32, in the order of the texts.

        Args:
            texts: texts, or (text, text pair) tuples, which are read together; a single text is a list of one.
            normalize: to length 1, so that a dot product is the cosine.
            batch_size: texts per batch, grouped by length; None takes ``data.batching.EVALUATION_ROWS``.

        Raises:
            DataError: something that is not a text.
            ModelError: the model does not give one vector per token.
        """
        checked = as_texts(texts)
        if not checked:
            return np.zeros((0, self.model.config.get_text_config().hidden_size), dtype=np.float32)
        encoded = self.tokenizer(checked, truncation=True, max_length=self.max_length)
        # an empty text may have no tokens at all
        rows = [ids or [self.tokenizer.pad_token_id or 0] for ids in encoded["input_ids"]]
        columns: dict[str, list[list[int]]] = {"input_ids": rows}
        if isinstance(checked[0], tuple) and "token_type_ids" in encoded:  # which tell the two texts apart
            columns["token_type_ids"] = encoded["token_type_ids"]
        lengths = np.array([len(ids) for ids in rows], dtype=np.int32)
        device = next(self.model.parameters()).device
        batches = by_length(lengths, batch_size, self.tokens, unpadded=reads_padding(self.model))
        pooled = [
            self._pooled({name: [values[row] for row in batch] for name, values in columns.items()}, device)
            for batch in batches
        ]
        vectors = np.concatenate(pooled)[np.argsort(np.concatenate(batches))]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize else vectors

    def _pooled(self, columns: dict[str, list[list[int]]], device: torch.device) -> np.ndarray:
        batch = {name: tensor.to(device) for name, tensor in collate(columns, self.tokenizer).items()}
        with dtypes.autocast(self.dtype, device):
            outputs = self.model(**batch)
        if self.pooling == "own":
            return outputs.vectors.numpy()
        hidden, mask = outputs.last_hidden_state, batch["attention_mask"]
        check_pools(self.model.config, hidden.shape[1], mask.shape[1])
        pooled = pooled_logits.pool(hidden, mask, self.pooling)
        return pooled.float().cpu().numpy()


def of_run(run: LoadedExport) -> Embedder:
    """The embedder of a loaded run and its active adapter.

    Raises:
        RunError: the method puts learned tokens before the text, which the backbone alone does not see; or an export
            in another format has no hidden states.
    """
    for config in getattr(run.model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise RunError(
                f"{run.path}: method '{run.manifest.method}' puts learned tokens before a text, and cannot embed it"
            )
    model, pooling = unwrap(run.model), run.loaded.pooling
    gives_vectors = getattr(model, "output", "") == "vectors"
    if not gives_vectors and not hasattr(model, "base_model"):
        raise RunError(f"{run.path}: an export of format '{run.manifest.saves}' has no vectors; use the run itself")
    encoder = model if gives_vectors else text_encoder(model.base_model)
    if pooling == "own" and not gives_vectors:
        pooling = _own_pooling(folder_of(resolve(run.recipe.model)), model.base_model.config)  # type: ignore[assignment]
    device = next(run.model.parameters()).device
    return Embedder(
        encoder, run.tokenizer, pooling, usable_length(run.tokenizer, run.manifest.max_length),
        dtypes.dtype_for(run.recipe.model, device), pass_tokens(run.recipe.training, device.type),
    )  # fmt: skip


def of_model(source: str, *, max_length: int = 512, device: str | None = None) -> Embedder:
    """The embedder of a base model: a hub id, ./folder, or package:NAME, in bf16 where that is native.

    ``device`` None takes CUDA if there is one.

    Raises:
        ModelError: there is no such model, or it has no hidden states of texts.
        HubError: it cannot be downloaded.
    """
    from transformers import AutoModel

    from peftkit.models.tokenizer import load_tokenizer

    silence_libraries()
    config = ModelConfig(source=source)
    folder, tokenizer = folder_of(resolve(config)), load_tokenizer(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtypes.dtype_for(config, device)
    try:
        model: Any = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{source}: the model cannot be loaded: {error}") from error
    model = text_encoder(model.to(device).eval().requires_grad_(False))
    return Embedder(
        model, tokenizer, _own_pooling(folder, model.config), usable_length(tokenizer, max_length), dtype,
        pass_tokens(TrainingConfig(), torch.device(device).type),
    )  # fmt: skip


def _own_pooling(folder: Path, config: Any) -> str:
    return sentence_pooling(folder) or ("last" if writes_text(config) else "mean")
