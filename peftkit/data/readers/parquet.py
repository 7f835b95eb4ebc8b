"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftkit.data.problems import Problems
from peftkit.data.reader import Reader
from peftkit.errors import DataError
from peftkit.schema.registries import READERS
from peftkit.schema.types import Row


@READERS.register("parquet")
class ParquetReader(Reader):
    """Parquet files; ``_line`` is the row's number."""

    extensions = (".parquet",)

    def rows(self, path: Path, problems: Problems) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
                for line, row in enumerate(rows, 1):
                    yield {**row, "_file": str(path), "_line": line}
        except (pa.ArrowException, OSError) as error:
            first = str(error).splitlines()[0]
            raise problems.fatal(DataError(f"not a Parquet file that can be read: {first}", file=path)) from None

    def class_names(self, path: Path) -> dict[str, list[str]]:
        """Names of the class-label columns that ``datasets`` wrote into the file's metadata."""
        import pyarrow.parquet as pq
        from datasets import Features

        from peftkit.data.tables import class_names

        try:
            return class_names(Features.from_arrow_schema(pq.read_schema(path)))
        except Exception:  # reading the rows reports whatever is wrong with the file
            return {}
