"""Views of experiments (comparisons, searches): one table as terminal text, Markdown and a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.text import Text

from peftkit.reporting import formatting, html, plots, tables
from peftkit.system.files import write_json


@dataclass(frozen=True)
class Page:
    """The content of a view; the first cell of each row is its name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: Sequence[str] = ()
    """The conclusion first."""
    images: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    """File name → plot and caption."""
    mark: str | None = None
    """First cell of the row in bold."""


def show(page: Page) -> None:
    """Prints the table and the sentences to stdout."""
    table = tables.table(page.title, *page.header)
    for row in page.rows:
        style = "bold" if row[0] == page.mark else ""
        table.add_row(*(Text(formatting.plain(cell), style=style) for cell in row))
    console = tables.console()
    console.print(table)
    for sentence in page.sentences:
        console.print(sentence, markup=False, soft_wrap=True)


def markdown(page: Page) -> str:
    """The table and the sentences as Markdown."""
    lines = [f"# {_cell(page.title)}", "", _line(page.header)]
    lines.append(_line([":--", *["--:"] * (len(page.header) - 1)]))
    for row in page.rows:
        lines.append(_line([f"**{_cell(cell)}**" if cell and row[0] == page.mark else _cell(cell) for cell in row]))
    return "\n".join([*lines, "", *(f"{_cell(sentence)}\n" for sentence in page.sentences)])


def plots_of(page: Page) -> dict[str, bytes]:
    """PNG plots by file name."""
    return {file: plots.png(figure) for file, (figure, _) in page.images.items()}


def render(page: Page, images: Mapping[str, bytes] | None = None, *, standalone: bool = True) -> str:
    """The page, or its body for a notebook; self-contained, without scripts, every text escaped.

    ``images`` are those of ``plots_of``, if drawn already.
    """
    drawn = plots_of(page) if images is None else images
    captioned = [(html.data_uri(image), page.images[file][1]) for file, image in drawn.items()]
    template = html.environment().get_template("experiment.html")
    return template.render(page=page, images=captioned, standalone=standalone)


def write(folder: Path, name: str, table: Mapping[str, Any], page: Page) -> None:
    """Writes NAME.json (the table that the page shows), NAME.md, NAME.html and the plots."""
    write_json(folder / f"{name}.json", table)
    (folder / f"{name}.md").write_text(markdown(page), encoding="utf-8")
    images = plots_of(page)
    (folder / f"{name}.html").write_text(render(page, images), encoding="utf-8")
    for file, image in images.items():
        (folder / file).write_bytes(image)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    plain = formatting.plain(text)
    return "".join(f"\\{letter}" if letter in "\\|*_`<>[]" else letter for letter in plain)
