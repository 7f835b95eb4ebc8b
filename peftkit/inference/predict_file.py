"""Predictions for a file or a pipe of texts: every input column, then the label and the probability of every label.

predict_file(run, file=Path("texts.csv"), column=None, out=Path("predictions.csv"))
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peftkit.data.problems import Problems, missing_column, shorten
from peftkit.data.reader import reader_for, reader_of_input
from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import DataError, RunError
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import Prediction, Row
from peftkit.system import files

if TYPE_CHECKING:
    from peftkit.export.in_memory import Merge
    from peftkit.inference.trained_model import LoadedRun

CHUNK = 512
"""Rows held at a time, by each process."""
WRITERS = (".csv", ".tsv", ".jsonl")


def predict_file(run: Path, *, file: Path | None, column: str | None, out: Path | None, merge: Merge = "auto") -> int:
    """Predicts the rows of ``file`` (or lines of stdin) into ``out`` (or as JSON lines to stdout); returns how many.

    The whole file is checked before the model is loaded, and ``out`` appears only when it is complete. ``merge`` is as
    for ``peftkit.load``. Processes that a launcher started share the rows; the main one reads and writes.

    Raises:
        RunError: ``run`` is not a finished run, or one of a language model.
        DataError: a file of a kind that cannot be read or written, a missing column, a row without a text.
    """
    from peftkit.inference.trained_model import load

    with process_group.init_process_group() as group:
        columns, names = group.run_on_main(lambda: _checked(run, file, column, out))
        model = group.main_first(lambda: load(run, merge=merge, device=group.device))
        rows = read_rows(file, columns, Problems()) if file else lines(sys.stdin, columns[0])
        answers = _answers(model, group, group.chunks(rows, CHUNK), columns, set(names))
        if not group.is_main:
            return sum(1 for _ in answers)
        if out is None:
            return _write_lines(answers, sys.stdout)
        with files.open_atomic(out) as stream:
            if out.suffix == ".jsonl":
                return _write_lines(answers, stream)
            return _write_table(answers, names, stream, out)


def _checked(run: Path, file: Path | None, column: str | None, out: Path | None) -> tuple[list[str], list[str]]:
    """The columns of the texts, and all columns of the input; raises everything that is wrong with them."""
    from peftkit.export import manifest
    from peftkit.export.loading import find_export

    check_paths(file, out)
    folder = find_export(run)
    if manifest.read(folder).head.writes_text:
        raise RunError(f"{run}: a language model has no labels to predict; use `peftkit generate` or `peftkit chat`")
    columns = _columns(Recipe.from_yaml(folder / "recipe.yaml"), column)
    if file:
        return columns, check_rows(file, columns)
    if len(columns) == 1:
        return columns, columns
    raise DataError(f"this model reads pairs ({' and '.join(columns)}); give them as a file: --file pairs.csv")


def check_paths(file: Path | None, out: Path | None, writers: tuple[str, ...] = WRITERS) -> None:
    """Raises DataError where the input cannot be read, or the output cannot be written."""
    if file:
        reader_of_input(file)
    if out and out.suffix not in writers:
        raise DataError(f"cannot be written: its name must end in {', '.join(writers)}", file=out)
    if out:
        files.check_output(out, file)


def _columns(recipe: Recipe, column: str | None) -> list[str]:
    first, *others = recipe.task.input_columns(recipe.data)
    return [column or first, *others]


def check_rows(file: Path, columns: list[str]) -> list[str]:
    """Reads the whole file; returns all its columns, and raises everything that is wrong with it at once."""
    problems = Problems()
    names: dict[str, None] = {}
    for row in read_rows(file, columns, problems):
        names |= dict.fromkeys(row)
    problems.check()
    return list(names)


def read_rows(file: Path, columns: list[str], problems: Problems) -> Iterator[Row]:
    """Rows of a file; those without a text under every one of the columns are noted as problems."""
    for row in reader_for(file)().inputs(file, problems, columns[0]):
        place = {"file": row.pop("_file"), "line": row.pop("_line")}
        for column in columns:
            if column not in row:
                raise missing_column(column, row, field="--column", file=file)
            if not isinstance(row[column], str):
                said = f"expected a text, found {shorten(row[column])}"
                problems.add(DataError(said, column=column, **place))
        yield row


def lines(stream: Iterable[str], column: str) -> Iterator[Row]:
    """A row for each line of a text."""
    for line in stream:
        yield {column: line.rstrip("\r\n")}


def _answers(
    model: LoadedRun, group: ProcessGroup, chunks: Iterator[list[Row]], columns: list[str], taken: set[str]
) -> Iterator[Row]:
    for chunk in chunks:
        texts = [tuple(row[column] for column in columns) if len(columns) > 1 else row[columns[0]] for row in chunk]
        for row, prediction in zip(chunk, group.map_sharded(texts, model.predict), strict=True):
            yield {**row, **_answer(prediction, taken)}


def _answer(prediction: Prediction, taken: set[str]) -> Row:
    """The prediction as columns; a name that the input has already gets ``predicted_`` before it."""
    return {f"predicted_{name}" if name in taken else name: value for name, value in prediction.columns().items()}


def _write_lines(rows: Iterator[Row], stream: IO[str]) -> int:
    count = 0
    for row in rows:
        stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        count += 1
    return count


def _write_table(rows: Iterator[Row], names: list[str], stream: IO[str], out: Path) -> int:
    first = next(rows, {})
    header = list(dict.fromkeys([*names, *first]))
    writer = csv.DictWriter(stream, header, delimiter="\t" if out.suffix == ".tsv" else ",")
    writer.writeheader()
    count = 0
    for row in itertools.chain([first] if first else [], rows):
        writer.writerow({name: _cell(value) for name, value in row.items()})
        count += 1
    return count


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
