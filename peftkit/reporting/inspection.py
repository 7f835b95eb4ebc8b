"""An inspection of data as terminal text, JSON, and a self-contained page."""

from __future__ import annotations

import html
import io
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peftkit.planning.inspection import Example, Inspection, SplitView

BAR = 40
SUPERVISED, SPECIAL, PLAIN = "bold green", "magenta", "dim"
_VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "→\t", "\r": "␍"})


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as JSON values."""
    return inspection.as_dict()


def as_text(inspection: Inspection, *, color: bool | None = None, width: int | None = None) -> str:
    """The inspection for a terminal or a log; colored on a terminal."""
    color = sys.stdout.isatty() if color is None else color
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=color,
        color_system="standard" if color else None,
        width=width or (None if color else 80),
        no_color=not color,
        force_jupyter=False,  # in a notebook, rich would display it at once and the text would be empty
    )
    console.print(render(inspection))
    return text.getvalue()


def render(inspection: Inspection) -> RenderableType:
    """The inspection as a rich renderable."""
    parts: list[RenderableType] = [
        Text(f"{inspection.name}: {', '.join(inspection.sources)}", style="bold"),
        Text(
            f"task {inspection.task} ({inspection.problem_type}), at most {inspection.max_length} tokens per row, "
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
    table = _numbers("Rows and tokens", "split", "rows", "examples", "tokens", "padding", *supervised)
    for split in inspection.splits:
        cells = [split.name, f"{split.rows:,}", f"{split.examples:,}", f"{split.tokens:,}", f"{split.padding:.1%}"]
        cells += ["–" if split.supervised is None else f"{split.supervised:.1%}"] if supervised else []
        table.add_row(*cells)
    return table


def _lengths_table(inspection: Inspection) -> Table:
    table = _numbers("Tokens per example", "split", "median", "95%", "longest", "truncated", "tokens cut")
    for split in inspection.splits:
        lengths = [str(split.quantiles[name]) for name in ("50%", "95%", "100%")]
        truncated = f"{split.truncated_examples:,} ({split.truncated_examples / split.examples:.1%})"
        table.add_row(split.name, *lengths, truncated, f"{split.truncated_tokens:,}")
    return table


def _numbers(title: str, first: str, *headings: str) -> Table:
    """A table of a name and right-aligned numbers that fits into 80 columns."""
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _has_supervised(inspection: Inspection) -> bool:
    return any(split.supervised is not None for split in inspection.splits)


def _classes_table(inspection: Inspection) -> Table:
    table = _numbers("Classes", "class", *(split.name for split in inspection.splits))
    for label in inspection.labels:
        counts = [split.classes.get(label, 0) for split in inspection.splits]
        shares = [f"{count:,} ({count / max(1, split.rows):.1%})" for count, split in zip(counts, inspection.splits)]
        table.add_row(escape(label), *shares)
    return table


def _steps_table(inspection: Inspection) -> RenderableType:
    if not inspection.steps:
        return Text("Cleaning changed nothing.")
    table = Table(title="Cleaning and splitting", title_justify="left")
    for name in ("step", "split", "action", "rows", "examples"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
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
    text.append(f"  label: {example.label}" if example.label else "", style="bold")
    text.append(f"  ({example.truncated} tokens truncated)\n" if example.truncated else "\n", style="yellow")
    for token in example.tokens:
        style = SUPERVISED if token.supervised else SPECIAL if token.special else PLAIN if not example.label else ""
        text.append(token.text.translate(_VISIBLE), style=style)
    text.append("\n")
    return text


def example_html(example: Example) -> str:
    """One example as HTML for notebooks; supervised tokens have a green background."""
    styles = {True: "background: #c9efd0; color: #10331a", False: "opacity: 0.6"}
    tokens = "".join(
        f'<span style="{styles[token.supervised]}">{html.escape(token.text.translate(_VISIBLE))}</span>'
        for token in example.tokens
    )
    return f"<p>{html.escape(example.place)}</p><pre style='white-space: pre-wrap'>{tokens}</pre>"


def write_html(inspection: Inspection, path: str | Path) -> Path:
    """Writes the inspection as a self-contained page; every text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = lambda text: text.translate(_VISIBLE)
    page = environment.from_string(PAGE).render(inspection=inspection, supervised=_has_supervised(inspection))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ inspection.name }}: data</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dee6; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } th { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem; border-radius: .4rem; }
.bar { background: #4a7fb5; height: .9rem; } .s { background: #c9efd0; } .x { color: #8a3fa0; } .cut { color: #a05a00; }
</style></head><body>
<h1>{{ inspection.name }}</h1>
<p>{{ inspection.sources | join(", ") }} · task {{ inspection.task }} ({{ inspection.problem_type }})
· at most {{ inspection.max_length }} tokens per row · {{ inspection.batch_size }} rows per batch</p>
<h2>Rows and tokens</h2>
<table><tr><th>split</th><th class="n">rows</th><th class="n">examples</th><th class="n">tokens</th>
<th class="n">median</th><th class="n">95%</th><th class="n">longest</th><th class="n">truncated</th>
<th class="n">tokens cut</th><th class="n">padding</th>{% if supervised %}<th class="n">supervised</th>{% endif %}</tr>
{% for split in inspection.splits %}
<tr><td>{{ split.name }}</td><td class="n">{{ "{:,}".format(split.rows) }}</td>
<td class="n">{{ "{:,}".format(split.examples) }}</td><td class="n">{{ "{:,}".format(split.tokens) }}</td>
<td class="n">{{ split.quantiles["50%"] }}</td><td class="n">{{ split.quantiles["95%"] }}</td>
<td class="n">{{ split.quantiles["100%"] }}</td><td class="n">{{ "{:,}".format(split.truncated_examples) }}</td>
<td class="n">{{ "{:,}".format(split.truncated_tokens) }}</td><td class="n">{{ "%.1f%%" % (split.padding * 100) }}</td>
{% if supervised %}<td class="n">{{ "–" if split.supervised is none else "%.1f%%" % (split.supervised * 100) }}</td>
{% endif %}</tr>
{% endfor %}</table>
{% if inspection.splits[0].classes %}<h2>Classes</h2>
<table><tr><th>class</th>{% for split in inspection.splits %}<th class="n">{{ split.name }}</th>{% endfor %}</tr>
{% for label in inspection.labels %}<tr><td>{{ label }}</td>{% for split in inspection.splits %}
<td class="n">{{ "{:,}".format(split.classes.get(label, 0)) }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
<h2>Cleaning and splitting</h2>
{% if inspection.steps %}<table>
<tr><th>step</th><th>split</th><th>action</th><th class="n">rows</th><th>examples</th></tr>
{% for step in inspection.steps %}<tr><td>{{ step.name }}</td><td>{{ step.split }}</td><td>{{ step.action }}</td>
<td class="n">{{ "{:,}".format(step.rows) }}</td>
<td>{% for place in step.examples %}{{ place }}<br>{% endfor %}</td></tr>
{% endfor %}</table>{% else %}<p>Cleaning changed nothing.</p>{% endif %}
{% for split in inspection.splits %}<h2>{{ split.name }}</h2>
<table><tr><th>tokens</th><th>examples</th><th class="n"></th></tr>
{% set most = split.histogram | map(attribute="examples") | max %}
{% for bar in split.histogram %}<tr><td>{{ bar.low }}–{{ bar.high }}</td>
<td style="width:22rem"><div class="bar" style="width:{{ (100 * bar.examples / most) | round(1) }}%"></div></td>
<td class="n">{{ "{:,}".format(bar.examples) }}</td></tr>
{% endfor %}</table>
{% for example in split.shown %}<p>{{ example.place }}{% if example.label %} · <b>{{ example.label }}</b>{% endif %}
{% if example.truncated %} · <span class="cut">{{ example.truncated }} tokens truncated</span>{% endif %}</p>
<pre>{% for token in example.tokens %}
{% if token.supervised %}<span class="s">{% elif token.special %}<span class="x">{% else %}<span>{% endif %}
{{- token.text | visible -}}
</span>{% endfor %}</pre>
{% endfor %}{% endfor %}
</body></html>
"""
"""The page; jinja escapes every value."""
