"""Rows → an Arrow file on disk, memory-mapped when read: ten times the rows do not take ten times the memory.

Types are found while writing. When a later row widens a type (null → text, integer → float, a new key), a new part is
begun, and the parts are rewritten under the final types at the end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pyarrow as pa

from peftkit.data.problems import shorten
from peftkit.errors import DataError
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000
_mapped: WeakSet[mmap.mmap] = WeakSet()
"""Maps of the tables that are open: read-only and over files, so that no content is lost with their pages."""
_MISFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


class RowWriter:
    """Writes rows to ``folder/name.arrow``.

    Args:
        used: columns that matter; a value in one of them that is of another type than those before is an error
            with file, line and column. Other columns with mixed types are left out, and listed in ``left_out``.
            None means that all columns matter.
    """

    def __init__(self, folder: Path, name: str, used: frozenset[str] | None = None) -> None:
        self.folder, self.name, self.used = folder, name, used
        self.types: dict[str, pa.DataType] = {}
        self.left_out: dict[str, DataError] = {}
        self._rows: list[Row] = []
        self._parts: list[Path] = []
        self._sink: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, row: Row) -> None:
        """Writes one row, in batches; raises DataError where a column's values are of mixed types."""
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def close(self) -> Dataset | None:
        """The rows as a memory-mapped data set; None when there were none."""
        self._flush()
        self._end_part()
        if not self._parts:
            return None
        path = self.folder / f"{self.name}.arrow"
        if len(self._parts) == 1 and not self.left_out:
            self._parts[0].rename(path)
        else:
            self._rewrite(path)
        return open_table(path)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        before, made = dict(self.types), {}
        for name in dict.fromkeys(key for row in rows for key in row):
            if name not in self.left_out:
                made[name] = self._widen(name, rows)
        if self._sink is None or before != self.types:
            self._begin_part()
        assert self._sink is not None
        self._sink.write_batch(_batch(rows, self.types, made))

    def _widen(self, name: str, rows: list[Row]) -> pa.Array | None:
        """The column under the type that its values have by themselves; None where it is left out from now on."""
        known = self.types.get(name, pa.null())
        try:
            column = pa.array([row.get(name) for row in rows])
            self.types[name] = unified(known, column.type)
            return column
        except _MISFIT:
            error = _misfit(name, rows, known)
            if self.used is None or name in self.used:
                raise error from None
            self.left_out[name] = error
            self.types.pop(name, None)
            return None

    def _begin_part(self) -> None:
        self._end_part()
        path = self.folder / f"{self.name}.part{len(self._parts)}"
        self._parts.append(path)
        self._sink = pa.ipc.new_stream(str(path), pa.schema(list(self.types.items())))

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def _rewrite(self, path: Path) -> None:
        with pa.ipc.new_stream(str(path), pa.schema(list(self.types.items()))) as sink:
            for part in self._parts:
                with pa.memory_map(str(part)) as source, pa.ipc.open_stream(source) as reader:
                    for batch in reader:
                        sink.write_batch(_batch(batch.to_pylist(), self.types))
                part.unlink()


def write_rows(rows: Iterable[Row], folder: Path, name: str, used: frozenset[str] | None = None) -> Dataset | None:
    """All rows in ``folder/name.arrow``, memory-mapped; None when there are none."""
    writer = RowWriter(folder, name, used)
    for row in rows:
        writer.add(row)
    return writer.close()


def open_table(path: Path) -> Dataset:
    """A memory-mapped data set over an Arrow stream file."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped.add(mapped)
    with pa.ipc.open_stream(pa.py_buffer(mapped)) as reader:
        held = Dataset(MemoryMappedTable(reader.read_all(), str(path)))
    release()
    return held


def release() -> None:
    """Lets go of the pages of all tables that were looked at; they are read again, mostly out of the system's cache.

    A page of a mapped file stays with the process until the system wants it back: without this, a pass over ten times
    the rows looks like ten times the memory.
    """
    for mapped in list(_mapped):
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)


def iterate(data: Dataset, columns: list[str] | None = None) -> Iterator[Row]:
    """Rows of a data set, read in batches: many times faster than row by row."""
    data = data if columns is None else data.select_columns(columns)
    for number, batch in enumerate(data.iter(batch_size=BATCH), 1):
        names = list(batch)
        for values in zip(*(batch[name] for name in names)):
            yield dict(zip(names, values))
        if number % 16 == 0:
            release()
    release()


def unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both; raises pyarrow's error where there is none but text."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_boolean(one) or pa.types.is_boolean(other):
        raise pa.ArrowTypeError(f"{one} and {other} differ")
    schemas = [pa.schema([("value", held)]) for held in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("value").type


def _batch(
    rows: list[Row], types: dict[str, pa.DataType], made: Mapping[str, pa.Array | None] | None = None
) -> pa.RecordBatch:
    """Rows under the types; ``made`` are columns that exist already, taken where they are of the type."""

    def column(name: str, held: pa.DataType) -> pa.Array:
        known = (made or {}).get(name)
        return known if known is not None and known.type == held else pa.array([row.get(name) for row in rows], held)

    arrays = [column(name, held) for name, held in types.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(list(types.items())))


def _misfit(name: str, rows: list[Row], known: pa.DataType) -> DataError:
    """The first row whose value does not go with those before it."""
    for row in rows:
        value: Any = row.get(name)
        try:
            known = unified(known, pa.array([value]).type)
        except _MISFIT:
            break
    said = (
        f"expected {_words(known)} as in the rows before, found {shorten(value)}; make the column's values of one type"
    )
    return DataError(said, file=row.get("_file"), line=row.get("_line"), column=name)


def _words(held: pa.DataType) -> str:
    if pa.types.is_string(held) or pa.types.is_large_string(held):
        return "text"
    if pa.types.is_integer(held) or pa.types.is_floating(held):
        return "a number"
    if pa.types.is_boolean(held):
        return "true or false"
    if pa.types.is_struct(held):
        return "an object"
    return "a list" if pa.types.is_list(held) else "another type"
