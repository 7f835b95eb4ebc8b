"""Rows → an Arrow file on disk, memory-mapped when read, so that memory does not grow with the number of rows.

Types are inferred while writing. When a later row widens a type (null → text, integer → float, a new key), a new part
file is started, and all parts are rewritten with the final types at the end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from peftkit.data.problems import shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row
from peftkit.system.memory import mapped_files, release_mapped_pages

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000
_MISFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


class _Writer:
    """The state of ``write_rows``: types so far, columns given up, and part files."""

    def __init__(self, folder: Path, name: str, used: frozenset[str] | None) -> None:
        self.folder, self.name, self.used = folder, name, used
        self.types: dict[str, pa.DataType] = {}
        self.dropped: set[str] = set()
        self._parts: list[Path] = []
        self._sink: pa.ipc.RecordBatchStreamWriter | None = None

    def close(self) -> Dataset | None:
        self._end_part()
        if not self._parts:
            return None
        path = self.folder / f"{self.name}.arrow"
        if len(self._parts) == 1 and not self.dropped:
            self._parts[0].rename(path)
            return open_table(path)
        with pa.ipc.new_stream(str(path), pa.schema(list(self.types.items()))) as sink:
            for part in self._parts:
                with pa.memory_map(str(part)) as source, pa.ipc.open_stream(source) as reader:
                    for batch in reader:
                        sink.write_batch(_batch(batch.to_pylist(), self.types, {}))
                part.unlink()
        return open_table(path)

    def write(self, rows: list[Row]) -> None:
        before, columns = dict(self.types), {}
        for name in dict.fromkeys(key for row in rows for key in row):
            if name not in self.dropped:
                columns[name] = self._widen(name, rows)
        if self._sink is None or before != self.types:
            self._end_part()
            self._parts.append(self.folder / f"{self.name}.part{len(self._parts)}")
            self._sink = pa.ipc.new_stream(str(self._parts[-1]), pa.schema(list(self.types.items())))
        self._sink.write_batch(_batch(rows, self.types, columns))

    def _widen(self, name: str, rows: list[Row]) -> pa.Array | None:
        """The column under its own values' type, by which ``types`` is widened; None if it is dropped from now on."""
        known = self.types.get(name, pa.null())
        try:
            column = pa.array([row.get(name) for row in rows])
            self.types[name] = unified(known, column.type)
            return column
        except _MISFIT:
            if self.used is None or name in self.used:
                raise _type_error(name, rows, known) from None
            self.dropped.add(name)
            self.types[name] = pa.null()
            return None

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def write_rows(rows: Iterable[Row], folder: Path, name: str, used: frozenset[str] | None = None) -> Dataset | None:
    """All rows in ``folder/name.arrow``, memory-mapped; None if there are none.

    Args:
        used: columns that are needed; a value in one of them that does not fit the type of the earlier ones is an
            error with file, line and column. Of other columns with mixed types only the name stays, over nulls. None
            means all columns.
    """
    writer, remaining = _Writer(folder, name, used), iter(rows)
    while batch := list(islice(remaining, BATCH)):
        writer.write(batch)
    return writer.close()


def open_table(path: Path) -> Dataset:
    """A memory-mapped data set over an Arrow stream file."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped_files.add(mapped)
    with pa.ipc.open_stream(pa.py_buffer(mapped)) as reader:
        table = Dataset(MemoryMappedTable(reader.read_all(), str(path)))
    release_mapped_pages()
    return table


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column → class names by id, of the columns of ``ClassLabel`` and of lists of them among a data set's features."""
    from datasets import ClassLabel

    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel) and kind.names}


def iterate(data: Dataset, columns: list[str] | None = None) -> Iterator[Row]:
    """Rows of a data set, read in batches, which is many times faster than one by one."""
    data = data if columns is None else data.select_columns(columns)
    for number, batch in enumerate(data.iter(batch_size=BATCH), 1):
        names = list(batch)
        for values in zip(*(batch[name] for name in names)):
            yield dict(zip(names, values))
        if number % 16 == 0:
            release_mapped_pages()
    release_mapped_pages()


def unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that can represent both; raises pyarrow's error where there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_boolean(one) or pa.types.is_boolean(other):
        raise pa.ArrowTypeError(f"{one} and {other} differ")
    schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("value").type


def _batch(rows: list[Row], types: dict[str, pa.DataType], columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Rows under the types; ``columns`` are arrays of them that exist already, reused where their type is right."""

    def array(name: str, kind: pa.DataType) -> pa.Array:
        if (ready := columns.get(name)) is not None and ready.type == kind:
            return ready
        if pa.types.is_null(kind):  # without values, or with mixed ones, which are given up
            return pa.nulls(len(rows))
        return pa.array([row.get(name) for row in rows], kind)

    arrays = [array(name, kind) for name, kind in types.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(list(types.items())))


def _type_error(name: str, rows: list[Row], known: pa.DataType) -> DataError:
    """The error for the first row whose value does not fit the type of those before it."""
    for row in rows:
        try:
            known = unified(known, pa.array([row.get(name)]).type)
        except _MISFIT:
            break
    message = f"expected {_describe(known)} as in the rows before, found {shorten(row.get(name))}"
    hint = "give all values of the column one type"
    return DataError(f"{message}; {hint}", file=row.get("_file"), line=row.get("_line"), column=name)


def _describe(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "a number"
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_struct(kind):
        return "an object"
    return "a list" if pa.types.is_list(kind) else "another type"
