"""Vectors for a file or a pipe of texts.

``.npy`` holds the vectors alone [rows, width]; ``.parquet`` and ``.jsonl`` the rows with a column ``vector``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import DataError, RunError
from peftkit.export.folder import ExportFolder, find_export, open_export
from peftkit.export.hub import is_hub_name
from peftkit.export.loading import load_exported
from peftkit.inference import embeddings, texts
from peftkit.inference.embeddings import Embedder
from peftkit.schema.types import Row
from peftkit.system import files

WRITERS = (".npy", ".parquet", ".jsonl")
VECTOR = "vector"
CHUNK = 2048
"""Rows in memory at a time, per process."""
Chunk = tuple[list[Row], np.ndarray]


def embed_file(
    source: str, *, file: Path | None, column: str | None, out: Path | None, normalize: bool, pair: str | None = None
) -> int:
    """Embeds the rows of ``file`` (or lines of stdin) into ``out``, or as JSON lines on stdout; returns how many.

    Rows are read, embedded and written a few thousand at a time. Processes that a launcher started share them; the
    main one reads and writes.

    Args:
        source: a run, an exported folder, or a base model.
        column: of the texts; None takes the run's own, or ``text`` for a base.
        pair: column of a second text that is read with the first; None takes the run's own, if it has one.

    Raises:
        DataError: a file that cannot be read or written, a missing column, a row without a text.
    """
    with process_group.init_process_group() as group:
        group.run_on_main(lambda: texts.check_files(file, out, WRITERS))
        run = group.run_collectively(lambda: open_run(source))
        data = run.recipe.data if run else None
        pair = pair or (run.recipe.data.text_pair if run and run.recipe.task.joins_pair else None)
        columns = [column or (data.text if data else "text"), *([pair] if pair else [])]
        rows = texts.InputTexts(file, columns, data)
        group.run_on_main(rows.check)
        model = group.main_first(lambda: embedder(run or source, group.device))
        chunks = _embed(model, group, group.chunks(iter(rows), CHUNK), columns, normalize)
        return _write(chunks, out) if group.is_main else sum(len(rows) for rows, _ in chunks)


def open_run(source: str) -> ExportFolder | None:
    """The run that ``source`` names; None for a base model."""
    folder = Path(source)
    if is_hub_name(source):
        return open_export(source)
    try:
        find_export(folder)
    except RunError:
        if (folder / "checkpoints").is_dir() or (folder / "adapter_config.json").is_file():
            raise  # it was meant as a run
        return None
    return open_export(folder)


def embedder(source: ExportFolder | str, device: str | None) -> Embedder:
    """What embeds texts, from a run or a base model."""
    if isinstance(source, str):
        return embeddings.of_model(source, device=device)
    return embeddings.of_run(load_exported(source, device=device, offloaded=True))


def _embed(
    model: Embedder, group: ProcessGroup, chunks: Iterator[list[Row]], columns: list[str], normalize: bool
) -> Iterator[Chunk]:
    for chunk in chunks:
        given = [texts.text_of(row, columns) for row in chunk]
        yield chunk, np.stack(group.map_sharded(given, lambda part: model.embed(part, normalize=normalize)))


def _write(chunks: Iterator[Chunk], out: Path | None) -> int:
    if out is None or out.suffix == ".jsonl":
        rows = ({**row, VECTOR: vector.tolist()} for chunk, vectors in chunks for row, vector in zip(chunk, vectors))
        return texts.write_rows(rows, out)
    with files.atomic_file(out) as staging:
        return (_write_array if out.suffix == ".npy" else _write_parquet)(chunks, staging)


def _write_array(chunks: Iterator[Chunk], staging: Path) -> int:
    """Writes the vectors one after the other, then the header again, with their number."""
    count, width = 0, 0
    with staging.open("wb") as file:
        start = _write_header(file, (0, 0))
        for rows, vectors in chunks:
            count, width = count + len(rows), vectors.shape[1]
            file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        file.seek(0)
        assert _write_header(file, (count, width)) == start, "the header has room for any number of rows"
    return count


def _write_header(file: IO[bytes], shape: tuple[int, int]) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.tell()


def _write_parquet(chunks: Iterator[Chunk], staging: Path) -> int:
    """Writes a row group per chunk; columns and types are those of the first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def as_table(rows: list[Row], vectors: np.ndarray) -> pa.Table:
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
        return pa.Table.from_pylist(rows).append_column(VECTOR, values)

    first = next(chunks, None)
    if first is None:
        pq.write_table(pa.table({VECTOR: pa.array([], pa.list_(pa.float32()))}), staging)
        return 0
    fields = [
        field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in as_table(*first).schema
    ]
    count, schema = 0, pa.schema(fields)
    with pq.ParquetWriter(staging, schema) as writer:
        for rows, vectors in itertools.chain([first], chunks):
            try:
                writer.write_table(as_table(rows, vectors).cast(schema))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
                problem = str(error).splitlines()[0]
                raise DataError(
                    f"rows {count} to {count + len(rows)} have other types than the first ones ({problem}); use .jsonl"
                ) from error
            count += len(rows)
    return count
