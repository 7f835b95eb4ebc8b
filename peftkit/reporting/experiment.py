"""What experiments (comparisons, searches) show: one table as terminal text, Markdown and a page with plots."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from peftkit.reporting import formatting, html, plots


@dataclass(frozen=True)
class Page:
    """Everything that is shown; the first cell of each row names it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    said: Sequence[str] = ()
    """Sentences: the conclusion first."""
    images: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    """File name → the plot and what it shows."""
    mark: str | None = None
    """First cell of the row that is printed bold."""


def terminal(page: Page) -> Table:
    """The table for a terminal."""
    table = Table(title=page.title, title_justify="left", title_style="bold", header_style="bold", padding=(0, 1))
    for number, heading in enumerate(page.header):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in page.rows:
        style = "bold" if row[0] == page.mark else ""
        table.add_row(*(Text(formatting.plain(cell), style=style) for cell in row))
    return table


def markdown(page: Page) -> str:
    """The table and the sentences as Markdown."""
    lines = [f"# {_cell(page.title)}", "", _line(page.header)]
    lines.append(_line([":--", *["--:"] * (len(page.header) - 1)]))
    for row in page.rows:
        lines.append(_line([f"**{_cell(cell)}**" if cell and row[0] == page.mark else _cell(cell) for cell in row]))
    return "\n".join([*lines, "", *(f"{_cell(sentence)}\n" for sentence in page.said)])


def render(page: Page, *, whole: bool = True) -> str:
    """The page, or its inside for a notebook; nothing is fetched, no script runs, every text is escaped."""
    images = [
        (f"data:image/png;base64,{base64.b64encode(plots.png(figure)).decode()}", said)
        for figure, said in page.images.values()
    ]
    return html.environment().get_template("experiment.html").render(page=page, images=images, whole=whole)


def write(page: Page, folder: Path, name: str) -> None:
    """Writes NAME.md, NAME.html and the plots."""
    (folder / f"{name}.md").write_text(markdown(page), encoding="utf-8")
    (folder / f"{name}.html").write_text(render(page), encoding="utf-8")
    for file, (figure, _) in page.images.items():
        plots.save(figure, folder / file)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that Markdown takes as it stands."""
    plain = formatting.plain(text)
    return "".join(f"\\{letter}" if letter in "\\|*_`<>[]" else letter for letter in plain)
