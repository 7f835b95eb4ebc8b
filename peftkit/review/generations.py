"""Generations for people to read and mark: ``generations.jsonl``, and a page that shows them side by side.

The page needs no network or server; the browser stores the marks, and saves them in the format of the first file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment

from peftkit.data.problems import Problems, located
from peftkit.data.readers.json_objects import JsonLinesReader
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.types import Row

TEMPLATE = Path(__file__).with_name("generations.html")
MARKS = ("good", "bad")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class GenerationRow:
    """One prompt and the texts generated for it."""

    prompt: str | Messages
    """A text to continue, or a conversation to answer."""
    reference: str | None
    """The answer or continuation in the data; None for a prompt of the user's."""
    base: str | None
    """The base model's text; None if it was not run."""
    finetuned: str
    """The trained model's text."""
    file: str | None = None
    line: int | None = None
    """Its line, from 1."""
    mark: Literal["good", "bad"] | None = None
    """A person's judgement of ``finetuned``."""

    @property
    def prompt_text(self) -> str:
        """The prompt as one text: a conversation's turns with their roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in self.prompt)


def write(folder: Path, rows: Sequence[GenerationRow], *, title: str = "Generations") -> tuple[Path, Path]:
    """Writes ``generations.jsonl`` and ``generations.html`` into the folder; returns their paths."""
    table, page = folder / "generations.jsonl", folder / "generations.html"
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
    table.write_text("".join(lines), encoding="utf-8")
    page.write_text(html(rows, title=title), encoding="utf-8")
    return table, page


def html(rows: Sequence[GenerationRow], *, title: str = "Generations") -> str:
    """The page; every text in it is escaped, so that a generated text is never markup or a script."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, rows=rows, data=[asdict(row) for row in rows])


def read(path: str | Path) -> list[GenerationRow]:
    """The rows of a ``generations.jsonl``, marked or not.

    Raises:
        DataError: the file cannot be read, or lines are not such rows; names file, line and field of each.
    """
    path, problems, rows = Path(path), Problems(), []
    try:
        for values in JsonLinesReader().rows(path, problems):
            file, line = values.pop("_file"), values.pop("_line")
            try:
                rows.append(_parse(values))
            except DataError as error:
                problems.add(located(error, file, line))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=path) from None
    problems.check()
    return rows


def marked_to_training_rows(path: str | Path, *, bad: bool = False) -> list[dict[str, Any]]:
    """The rows marked good, as rows to train on.

    A chat becomes ``messages``. A text becomes ``text``, for another run of style, and ``prompt`` and ``completion``,
    which instruction tuning reads.

    Args:
        bad: keep the rows marked bad as well; every row has a ``label`` then, true for a good one, with which
            ``task.kind=preference task.loss=kto`` reads them.

    Raises:
        DataError: the file is not in the page's format, or no row is marked good (with ``bad``: or none is marked bad).
    """
    marked = [row for row in read(path) if row.mark is not None]
    for mark in MARKS if bad else MARKS[:1]:
        if all(row.mark != mark for row in marked):
            message = f"no row is marked {mark}; mark rows on the generations page and save them first"
            raise DataError(message, file=path)
    if bad:
        return [{**_training_row(row), "label": row.mark == "good"} for row in marked]
    return [_training_row(row) for row in marked if row.mark == "good"]


def _training_row(row: GenerationRow) -> dict[str, Any]:
    if isinstance(row.prompt, str):
        return {"text": row.prompt + row.finetuned, "prompt": row.prompt, "completion": row.finetuned}
    return {"messages": [*row.prompt, {"role": "assistant", "content": row.finetuned}]}


def _parse(values: Row) -> GenerationRow:
    known = [field.name for field in fields(GenerationRow)]
    for name in values:
        if name not in known:
            raise DataError(f"unknown field: {did_you_mean(name, known)}", column=name)
    prompt, mark = values.get("prompt"), values.get("mark")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_turn, prompt))):
        raise DataError("expected a text, or a list of {role, content}", column="prompt")
    if not isinstance(values.get("finetuned"), str):
        raise DataError("expected a text", column="finetuned")
    if mark not in (None, *MARKS):
        raise DataError(f"expected {', '.join(MARKS)} or null, found {mark!r}", column="mark")
    return GenerationRow(**{"reference": None, "base": None, **values})


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
