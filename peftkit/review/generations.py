"""Generations for a person to read and mark: ``generations.jsonl``, and a page that shows them side by side.

    write(folder, rows)                              # generations.jsonl and generations.html
    rows = marked_to_training_rows("marked.jsonl")   # what was marked good, as rows to train on

The page needs no network and no server. Its marks are kept by the browser, and are saved as a file of the same
form as ``generations.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment

from peftkit.errors import DataError, did_you_mean

TEMPLATE = Path(__file__).with_name("generations.html")
MARKS = ("good", "bad")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class GenerationRow:
    """One prompt and what was made of it."""

    prompt: str | Messages
    """A text to continue, or a conversation to answer."""
    reference: str | None
    """The data's own answer or continuation; None for a prompt of the user's."""
    base: str | None
    """What the base model made of it; None where it was not asked."""
    finetuned: str
    """What the trained model made of it."""
    file: str | None = None
    """Where the row stands in the data."""
    line: int | None = None
    """Its line there, from 1."""
    mark: Literal["good", "bad"] | None = None
    """A person's judgement of ``finetuned``."""

    @property
    def prompt_text(self) -> str:
        """The prompt for reading: a conversation's turns with their roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in self.prompt)


def write(folder: Path, rows: Sequence[GenerationRow], *, title: str = "Generations") -> tuple[Path, Path]:
    """Writes ``generations.jsonl`` and ``generations.html`` into the folder; returns their paths."""
    table, page = folder / "generations.jsonl", folder / "generations.html"
    table.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    page.write_text(html(rows, title=title), encoding="utf-8")
    return table, page


def html(rows: Sequence[GenerationRow], *, title: str = "Generations") -> str:
    """The page. Every text in it is escaped: what a model writes is never markup, nor a script."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, rows=rows, data=[asdict(row) for row in rows])


def read(path: str | Path) -> list[GenerationRow]:
    """The rows of a ``generations.jsonl``, marked or not.

    Raises:
        DataError: a line is not a row of this form; names file, line and field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({error})", file=path) from None
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, path, number) for number, line in lines if line.strip()]


def marked_to_training_rows(path: str | Path) -> list[dict[str, Any]]:
    """What was marked good, as rows to train on.

    A chat becomes ``messages``. A text becomes ``text`` for another run of style, with its ``prompt`` and
    ``completion`` beside it, which instruction tuning reads.

    Raises:
        DataError: the file is not of the page's form, or nothing in it is marked good.
    """
    good = [row for row in read(path) if row.mark == "good"]
    if not good:
        raise DataError("nothing is marked good; mark rows on the generations page and save them first", file=path)
    return [_training_row(row) for row in good]


def _training_row(row: GenerationRow) -> dict[str, Any]:
    if isinstance(row.prompt, str):
        return {"text": row.prompt + row.finetuned, "prompt": row.prompt, "completion": row.finetuned}
    return {"messages": [*row.prompt, {"role": "assistant", "content": row.finetuned}]}


def _line(row: GenerationRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _parse(line: str, path: Path, number: int) -> GenerationRow:
    def wrong(message: str, column: str | None = None) -> DataError:
        return DataError(message, file=path, line=number, column=column)

    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise wrong(f"expected a JSON object, found something else ({error})") from None
    if not isinstance(value, dict):
        raise wrong(f"expected a JSON object, found {type(value).__name__}")
    known = [field.name for field in fields(GenerationRow)]
    for name in value:
        if name not in known:
            raise wrong(f"unknown field: {did_you_mean(name, known)}", name)
    for problem, name in _problems(value):
        raise wrong(problem, name)
    return GenerationRow(**{"reference": None, "base": None, **value})


def _problems(value: dict[str, Any]) -> Iterable[tuple[str, str]]:
    prompt = value.get("prompt")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_turn, prompt))):
        yield "expected a text, or a list of {role, content}", "prompt"
    if not isinstance(value.get("finetuned"), str):
        yield "expected a text", "finetuned"
    if value.get("mark") not in (None, *MARKS):
        yield f"expected good, bad or null, found {value['mark']!r}", "mark"


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
