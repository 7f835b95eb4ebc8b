"""Texts for a file or a pipe of prompts: every input column, then the prompt and what was generated.

Rows hold ``prompt``, ``messages`` or ``conversations``, or ``instruction`` and ``input``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peftkit.data.problems import Problems
from peftkit.data.reader import DocumentReader, reader_for
from peftkit.distributed import process_group
from peftkit.errors import DataError, ModelError, RunError
from peftkit.export.folder import ExportFolder, open_export
from peftkit.inference import prompts, texts
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from peftkit.export.merging import MergeMode


def generate_file(
    run: Path, *, file: Path | None, out: Path | None, options: Mapping[str, Any], merge: MergeMode = "auto"
) -> int:
    """Generates a text per row of ``file`` (or line of stdin), as JSON lines in ``out`` (or stdout); returns how many.

    All prompts are checked before the model is loaded, and ``out`` appears only when it is complete. ``merge`` is as
    for ``peftkit.load``. Processes that a launcher started share the prompts; each prompt has its own noise, whichever
    process continues it.

    Raises:
        RunError: ``run`` is not a finished run of a language model.
        RecipeError: an unknown option of generation.
        DataError: a file that cannot be read, or rows without a prompt; names file, line and column.
    """
    from peftkit.inference import trained_model

    with process_group.init_process_group() as group:
        export = group.run_collectively(lambda: open_language_run(run))
        rows = group.run_on_main(lambda: _read_and_check(export, file, out, options))
        if rows:
            model = group.main_first(lambda: trained_model.load(export, merge=merge, device=group.device))
            generated = group.map_sharded(
                range(len(rows)),
                lambda mine: model.generate([rows[number]["prompt"] for number in mine], numbers=mine, **options),
            )
            rows = [
                {**{name: value for name, value in row.items() if not name.startswith("_")}, "generated": text}
                for row, text in zip(rows, generated, strict=True)
            ]
        return texts.write_rows(rows, out) if group.is_main else len(rows)


def open_language_run(run: Path) -> ExportFolder:
    """The export of a run that generates text; raises RunError for any other."""
    export = open_export(run)
    if not export.manifest.head.writes_text:
        raise RunError(f"{run}: task.kind={export.manifest.task} writes no text; use `peftkit predict`")
    return export


def _read_and_check(export: ExportFolder, file: Path | None, out: Path | None, options: Mapping[str, Any]) -> list[Row]:
    """The rows; raises everything that is wrong with them, the paths and the options."""
    texts.check_files(file, out)
    settings = prompts.generation_config(export.recipe, options)
    rows = _read(file, export.recipe)
    _check_lengths(export, rows, settings.max_new_tokens)
    return rows


def _read(file: Path | None, recipe: Recipe) -> list[Row]:
    """Rows with ``prompt``, ``_file`` and ``_line``; raises everything that is wrong with them at once."""
    from peftkit.tasks import conversation

    problems, rows = Problems(), []
    is_text = file is None or issubclass(reader_for(file), DocumentReader)
    for row in texts.read_rows(file, "prompt", problems, recipe.data):
        if is_text and not row["prompt"].strip():
            continue  # blank lines separate prompts
        try:
            prompt = conversation.read_prompt(row, recipe.data)
            if isinstance(prompt, str) and not prompt.strip():
                raise DataError("the prompt is empty; give it some text", column="prompt")
            rows.append({**row, "prompt": prompt})
        except DataError as error:
            problems.add(DataError(error.message, file=row["_file"], line=row["_line"], column=error.column))
    problems.check()
    texts.print_notes(problems.take_notes())
    return rows


def _check_lengths(export: ExportFolder, rows: list[Row], new_tokens: int) -> None:
    """Raises DataError, by file and line, for prompts that the template refuses or that exceed the context."""
    from transformers import AutoConfig

    from peftkit.evaluation import generation
    from peftkit.models.tokenizer import tokenizer_in

    problems, tokenizer = Problems(), tokenizer_in(export.path)
    model = SimpleNamespace(config=AutoConfig.from_pretrained(export.path))
    context, source = generation.context_length(model), generation.reads_source(model)
    for row in rows:
        place = {"file": row["_file"], "line": row["_line"]}
        try:
            ids = generation.encode(tokenizer, prompts.as_prompt(row["prompt"], export.recipe), source=source)
        except ModelError as error:
            raise DataError(str(error), **place) from None
        if not ids:
            problems.add(DataError("the prompt is empty; give it some text", **place))
        elif context is not None and source and max(len(ids), new_tokens + 1) > context:
            message = (
                f"the prompt has {len(ids)} tokens and is to be answered with up to {new_tokens}, but the model reads "
                f"and writes {context} at most; shorten it, or lower --max-new-tokens"
            )
            problems.add(DataError(message, **place))
        elif context is not None and not source and len(ids) + new_tokens > context:
            message = (
                f"the prompt has {len(ids)} tokens, which with {new_tokens} new ones exceed the model's context of "
                f"{context}; shorten it, or ask for fewer with --max-new-tokens"
            )
            problems.add(DataError(message, **place))
    problems.check()
