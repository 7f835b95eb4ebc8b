"""An inspection of data as terminal text, JSON, and a self-contained page."""

from __future__ import annotations

import sys
from html import escape as escape_html
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peftkit.planning.inspection import Example, Inspection, SplitView
from peftkit.reporting import html, tables

BAR = 40
SUPERVISED, SPECIAL, PLAIN, NOTE = "bold green", "magenta", "dim", "yellow"
_VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "→\t", "\r": "␍"})


def as_text(inspection: Inspection, *, color: bool | None = None, width: int | None = None) -> str:
    """The inspection for a terminal or a log; colored on a terminal."""
    color = sys.stdout.isatty() if color is None else color
    console = Console(
        force_terminal=color,
        color_system="standard" if color else None,
        width=width or (None if color else 80),
        force_jupyter=False,  # in a notebook, rich would display it at once and the text would be empty
    )
    with console.capture() as capture:
        console.print(_render(inspection))
    return capture.get()


def _render(inspection: Inspection) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"{inspection.name}: {', '.join(inspection.sources)}", style="bold"),
        Text(
            f"task {inspection.what}, at most {inspection.max_length} tokens per {inspection.length_unit}, "
            f"{inspection.batch_size} rows per batch"
        ),
        _rows_table(inspection),
        _lengths_table(inspection),
    ]
    if any(split.classes for split in inspection.splits):
        parts.append(_classes_table(inspection))
    parts.append(_steps_table(inspection))
    for split in inspection.splits:
        parts += [Rule(f"{split.name}: tokens per example", align="left"), _histogram(split)]
        parts += [_example(example) for example in split.shown]
    return Group(*parts)


def _rows_table(inspection: Inspection) -> Table:
    supervised = ("supervised",) if _has_supervised(inspection) else ()
    table = tables.table("Rows and tokens", "split", "rows", "examples", "tokens", "padding", *supervised)
    for split in inspection.splits:
        cells = [split.name, f"{split.rows:,}", f"{split.examples:,}", f"{split.tokens:,}", f"{split.padding:.1%}"]
        cells += ["–" if split.supervised is None else f"{split.supervised:.1%}"] if supervised else []
        table.add_row(*cells)
    return table


def _lengths_table(inspection: Inspection) -> Table:
    table = tables.table("Tokens per example", "split", "median", "95%", "longest", "truncated", "tokens cut")
    for split in inspection.splits:
        lengths = [str(split.quantiles[name]) for name in ("50%", "95%", "100%")]
        truncated = f"{split.truncated_examples:,} ({split.truncated_examples / split.examples:.1%})"
        table.add_row(split.name, *lengths, truncated, f"{split.truncated_tokens:,}")
    return table


def _has_supervised(inspection: Inspection) -> bool:
    return any(split.supervised is not None for split in inspection.splits)


def _classes_table(inspection: Inspection) -> Table:
    title = f"Classes ({inspection.class_unit})"
    table = tables.table(title, "class", *(split.name for split in inspection.splits))
    for label, shares in inspection.class_shares.items():
        table.add_row(escape(label), *(f"{count:,} ({share:.1%})" for count, share in shares))
    return table


def _steps_table(inspection: Inspection) -> RenderableType:
    if not inspection.steps:
        return Text("Cleaning changed nothing.")
    texts = ("split", "action", "examples")
    table = tables.table("Cleaning and splitting", "step", "split", "action", "rows", "examples", left=texts)
    for step in inspection.steps:
        places = escape("\n".join(step.examples[:3]))
        table.add_row(step.name.replace("_", " "), step.split, step.action, f"{step.rows:,}", places)
    return table


def _histogram(split: SplitView) -> Text:
    most = max(bar.examples for bar in split.histogram)
    lines = []
    for bar in split.histogram:
        filled = round(BAR * bar.examples / most) or int(bar.examples > 0)
        lines.append(f"{bar.low:>6}–{bar.high:<6} {'█' * filled:<{BAR}} {bar.examples:,}")
    return Text("\n".join(lines))


def _example(example: Example) -> Text:
    text = Text(f"\n{example.place}", style="")
    text.append(f"  {example.part}" if example.part else "", style="bold")
    text.append(f"  label: {example.label}" if example.label else "", style="bold")
    text.append(f"  ({example.truncated} tokens truncated)\n" if example.truncated else "\n", style="yellow")
    for token in example.tokens:
        style = SUPERVISED if token.supervised else SPECIAL if token.special else PLAIN if not example.label else ""
        text.append(token.text.translate(_VISIBLE), style=style)
        text.append(f"[{token.note}]" if token.note else "", style=NOTE)
    text.append("\n")
    return text


def example_html(example: Example) -> str:
    """One example as HTML for notebooks; supervised tokens have a green background."""
    styles = {True: "background: #c9efd0; color: #10331a", False: "opacity: 0.6"}
    tokens = "".join(
        f'<span style="{styles[token.supervised]}">{escape_html(token.text.translate(_VISIBLE))}</span>'
        + (f"<sub>{escape_html(token.note)}</sub>" if token.note else "")
        for token in example.tokens
    )
    place = f"{example.place} {example.part}".rstrip()
    return f"<p>{escape_html(place)}</p><pre style='white-space: pre-wrap'>{tokens}</pre>"


def write_html(inspection: Inspection, path: Path) -> None:
    """Writes the inspection as a self-contained page; every text is escaped."""
    template = html.environment().get_template("inspection.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    page = template.render(inspection=inspection, supervised=_has_supervised(inspection), visible=_VISIBLE)
    path.write_text(page, encoding="utf-8")
