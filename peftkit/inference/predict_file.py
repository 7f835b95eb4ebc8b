"""Predictions for a file or a pipe of texts: every input column, then the label and the probability of every label."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import RunError
from peftkit.export.folder import ExportFolder, open_export
from peftkit.inference import texts
from peftkit.inference.backends import AUTO, FEWEST, PROBE
from peftkit.schema.head import Head
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from peftkit.export.merging import MergeMode
    from peftkit.inference.trained_model import LoadedRun

CHUNK = 512
"""Rows in memory at a time, per process; of a head that ranks texts all of them."""
BACKEND = "backend"
"""Column of what predicted a row."""
WRITERS = (*texts.TABLES, ".jsonl")
Observer = Callable[["LoadedRun", list[Any], Sequence[Any], float], None]


def predict_file(
    run: Path, *, file: Path | None, column: str | None, out: Path | None, merge: MergeMode = "auto",
    delimiter: str | None = None, observe: Observer | None = None, backend: str = AUTO,
) -> int:  # fmt: skip
    """Predicts the rows of ``file`` (or lines of stdin) into ``out`` (or as JSON lines to stdout); returns how many.

    The whole file is checked before the model is loaded, and ``out`` appears only when it is complete. ``merge`` is as
    for ``peftkit.load``, ``delimiter`` as for ``texts.data_options``. Processes that a launcher started share the rows;
    the main one reads and writes, and calls ``observe`` with the model, texts, their predictions and the seconds that
    they took. ``backend`` is as for ``peftkit.load``; with "auto" the main process measures and prints which one it
    took, and why. Rows of a pipe, whose number is not known, are predicted by torch.

    Raises:
        RunError: ``run`` is not a finished run, or one of a language model, or has no proven export for ``backend``.
        DataError: a file of a kind that cannot be read or written, a missing column, a row without a text.
    """
    from peftkit.inference import trained_model

    with process_group.init_process_group() as group:
        group.run_on_main(lambda: texts.check_files(file, out, WRITERS))
        export = group.run_collectively(lambda: _open(run))
        first, *others = export.recipe.task.input_columns(export.recipe.data)
        columns = [column or first, *others]
        rows = texts.InputTexts(file, columns, texts.data_options(export.recipe, delimiter))
        names = group.run_on_main(rows.check)
        model = group.main_first(lambda: trained_model.load(export, merge=merge, device=group.device, backend=backend))
        _choose_backend(model, group, rows, columns)
        observe = observe if group.is_main else None
        head = export.manifest.head
        chunks = group.chunks(iter(rows), sys.maxsize // group.world_size if head.ranks else CHUNK)
        answers = _answers(model, head, group, chunks, columns, set(names), observe)
        return texts.write_rows(answers, out, names) if group.is_main else sum(1 for _ in answers)


def _open(run: Path) -> ExportFolder:
    export = open_export(run)
    if export.manifest.head.writes_text:
        raise RunError(f"{run}: a language model has no labels to predict; use `peftkit generate` or `peftkit chat`")
    return export


def _choose_backend(model: LoadedRun, group: ProcessGroup, rows: texts.InputTexts, columns: list[str]) -> None:
    """Chooses what predicts the whole file, the same on every process; the main one prints why."""

    def choose() -> str:
        if not model.backend.pending or rows.count is None or rows.count < FEWEST:
            return model.backend.name
        first = model.input_rows([texts.text_of(row, columns) for row in rows.first(PROBE)])
        chosen = model.choose_backend(first, rows.count)
        texts.print_notes([f"predicting with {chosen.name}: {chosen.reason}"])
        return chosen.name

    name = group.run_on_main(choose)
    group.run_collectively(lambda: model.use_backend(name))


def _answers(
    model: LoadedRun, head: Head, group: ProcessGroup, chunks: Iterator[list[Row]], columns: list[str], taken: set[str],
    observe: Observer | None,
) -> Iterator[Row]:  # fmt: skip
    """The rows with their predictions and what made them as columns.

    A name that the input has already gets the prefix ``predicted_``.
    """
    for chunk in chunks:
        started, inputs = time.perf_counter(), [texts.text_of(row, columns) for row in chunk]
        predictions = head.complete_answers(group.map_sharded(inputs, model.predict), inputs)
        if observe is not None:
            observe(model, inputs, predictions, time.perf_counter() - started)
        for row, prediction in zip(chunk, predictions, strict=True):
            answer = {**prediction.columns(), BACKEND: model.backend.name}.items()
            yield row | {f"predicted_{name}" if name in taken else name: value for name, value in answer}
