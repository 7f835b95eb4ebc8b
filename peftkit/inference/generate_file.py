"""Texts for a file or a pipe of prompts: every input column, then the prompt and what was written.

generate_file(run, file=Path("prompts.jsonl"), out=Path("texts.jsonl"), options={"max_new_tokens": 64})

    {"prompt": "In the beginning"}                                   continued, or answered, as the run was trained
    {"messages": [{"role": "user", "content": "Hello"}]}             answered; also under "conversations" or "prompt"
    {"instruction": "Translate.", "input": "chat"}                   answered; an "output" is passed over
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peftkit.data.problems import Problems
from peftkit.data.reader import DocumentReader, reader_for, reader_of_input
from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import DataError, ModelError, RunError
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import Row
from peftkit.system import files

if TYPE_CHECKING:
    from peftkit.export.in_memory import Merge

STDIN = "stdin"
WRITTEN = "generated"


def generate_file(
    run: Path, *, file: Path | None, out: Path | None, options: Mapping[str, Any], merge: Merge = "auto"
) -> int:
    """Writes a text for each row of ``file`` (or line of stdin) to ``out`` (or stdout) as JSON lines; returns how many.

    All prompts are checked before the model is loaded, and ``out`` appears only when it is complete. ``merge`` is as
    for ``peftkit.load``. Processes that a launcher started share the prompts; a prompt's noise is its own, whoever
    continues it.

    Raises:
        RunError: ``run`` is not a finished run of a language model.
        RecipeError: an option of generation that there is none of.
        DataError: a file that cannot be read, or rows without a prompt; names file, line and column.
    """
    with process_group.init_process_group() as group:
        rows = group.run_on_main(lambda: _checked(run, file, out, options))
        texts = _texts(run, group, [row["prompt"] for row in rows], options, merge) if rows else []
        lines = [{**_input(row), "prompt": row["prompt"], WRITTEN: text} for row, text in zip(rows, texts, strict=True)]
        if not group.is_main:
            return len(lines)
        if out is None:
            return _write(lines, sys.stdout)
        with files.open_atomic(out) as stream:
            return _write(lines, stream)


def _checked(run: Path, file: Path | None, out: Path | None, options: Mapping[str, Any]) -> list[Row]:
    """The rows; raises everything that is wrong with them, the paths and the options."""
    from peftkit.inference.trained_model import generation_config

    folder, recipe = language_run(run)
    if file:
        reader_of_input(file)
    if out:
        files.check_output(out, file)
    settings = generation_config(recipe, options)
    rows = _read(file, recipe)
    check_readable(folder, recipe, rows, settings.max_new_tokens)
    return rows


def _texts(run: Path, group: ProcessGroup, prompts: list[Any], options: Mapping[str, Any], merge: Merge) -> list[str]:
    from peftkit.inference.trained_model import load

    model = group.main_first(lambda: load(run, merge=merge, device=group.device))
    return group.map_sharded(
        range(len(prompts)),
        lambda mine: model.generate([prompts[number] for number in mine], numbers=mine, **options),
    )


def language_run(run: Path) -> tuple[Path, Recipe]:
    """The exported folder and the recipe of a run that writes text; raises RunError for any other."""
    from peftkit.export import manifest
    from peftkit.export.loading import find_export

    folder = find_export(run)
    if not manifest.read(folder).head.writes_text:
        raise RunError(f"{run}: a classifier writes no text; use `peftkit predict`")
    return folder, Recipe.from_yaml(folder / "recipe.yaml")


def check_readable(folder: Path, recipe: Recipe, rows: Sequence[Row], new_tokens: int) -> None:
    """Raises DataError, by file and line, for prompts that the template refuses or the context is too short for."""
    from peftkit.evaluation import generation
    from peftkit.inference.trained_model import as_prompt
    from peftkit.models.tokenizer import tokenizer_in

    problems, tokenizer, context = Problems(), tokenizer_in(folder), _context(folder)
    for row in rows:
        place = {"file": row["_file"], "line": row["_line"]}
        try:
            ids = generation.encode(tokenizer, as_prompt(row["prompt"], recipe))
        except ModelError as error:
            raise DataError(str(error), **place) from None
        if not ids:
            problems.add(DataError("the prompt is empty; give it some text", **place))
        elif context is not None and len(ids) + new_tokens > context:
            problems.add(
                DataError(
                    f"the prompt has {len(ids)} tokens, which with {new_tokens} new ones is more than the model's "
                    f"context of {context}; shorten it, or ask for fewer with --max-new-tokens",
                    **place,
                )
            )
    problems.check()


def _context(folder: Path) -> int | None:
    """Tokens that the exported model reads at most; None where its config does not say."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    from peftkit.evaluation import generation

    return generation.context_length(SimpleNamespace(config=AutoConfig.from_pretrained(folder)))


def _read(file: Path | None, recipe: Recipe) -> list[Row]:
    """Rows with ``prompt``, ``_file`` and ``_line``; raises everything that is wrong with them at once."""
    from peftkit.tasks import conversation

    problems, rows = Problems(), []
    for row in _rows(file, problems):
        try:
            prompt = conversation.read_prompt(row, recipe.data.columns, recipe.data.text)
            if isinstance(prompt, str) and not prompt.strip():
                raise DataError("the prompt is empty; give it some text", column="prompt")
            rows.append({**row, "prompt": prompt})
        except DataError as error:
            problems.add(DataError(error.message, file=row["_file"], line=row["_line"], column=error.column))
    problems.check()
    return rows


def _rows(file: Path | None, problems: Problems) -> Iterator[Row]:
    """Rows of a file, or a prompt per line of a text; blank lines are skipped."""
    if file is None:
        lines: Iterable[Row] = (
            {"prompt": line.rstrip("\r\n"), "_file": STDIN, "_line": number} for number, line in enumerate(sys.stdin, 1)
        )
    else:
        reader = reader_for(file)()
        lines = reader.inputs(file, problems, "prompt")
        if not isinstance(reader, DocumentReader):
            return iter(lines)
    return (row for row in lines if row["prompt"].strip())


def _input(row: Row) -> Row:
    return {name: value for name, value in row.items() if not name.startswith("_")}


def _write(lines: Iterable[Row], stream: IO[str]) -> int:
    made = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines]
    stream.writelines(made)
    return len(made)
