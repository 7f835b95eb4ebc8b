"""The table of methods: what each is defined for, over which weights it trains, and whether it merges.

    peftkit list --methods                   # in the terminal
    python docs/generate_methods.py          # docs/methods.md

Everything is read off the methods' own classes, which refuse what the table leaves empty.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peftkit.schema.registries import METHODS, QUANTIZATIONS

HEADS = ("classifier", "decoder's classifier", "language model")


@dataclass(frozen=True)
class TableRow:
    """One method."""

    kind: str
    summary: str
    """First line of the class's documentation."""
    paper: str
    learning_rate: float
    """Where the recipe names none."""
    classifier: bool
    """On an encoder."""
    decoder_classifier: bool
    """On a decoder, whose last token it reads."""
    language_model: bool
    quantizations: tuple[str, ...]
    """Kinds that it stands on, besides whole weights."""
    merges: bool
    exports: str
    """adapter, or model."""


def rows() -> list[TableRow]:
    """Every registered method, by kind; imports neither torch nor peft."""
    return [_row(kind, METHODS.get(kind)) for kind in METHODS.names()]


def as_json() -> list[dict[str, Any]]:
    """The same as plain values."""
    return [asdict(row) for row in rows()]


def text() -> str:
    """Kind and summary, a line each."""
    found = rows()
    width = max(len(row.kind) for row in found)
    return "\n".join(f"{row.kind:<{width}}  {row.summary}" for row in found)


def markdown() -> str:
    """The table with a column for each kind of weights."""
    kinds = QUANTIZATIONS.names()
    columns = ["method", "what", "learning rate", *HEADS, "whole", *kinds, "merges", "exports"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows():
        summary = f"[{row.summary}]({row.paper})" if row.paper else row.summary
        held = [_mark(kind in row.quantizations) for kind in kinds]
        heads = [_mark(row.classifier), _mark(row.decoder_classifier), _mark(row.language_model)]
        marks = [*heads, _mark(True), *held, _mark(row.merges), row.exports]
        lines.append(_line([f"`{row.kind}`", summary, f"{row.learning_rate:g}", *marks]))
    return "\n".join(lines)


def _row(kind: str, method: Any) -> TableRow:
    trains_base = method.saves == "model"
    all_kinds = tuple(QUANTIZATIONS.names()) if method.quantizations is None else method.quantizations
    return TableRow(
        kind=kind,
        summary=(method.__doc__ or "").strip().splitlines()[0].rstrip("."),
        paper=method.paper,
        learning_rate=method.default_learning_rate,
        classifier=True,
        decoder_classifier=method.keeps_token_ids,
        language_model=method.adapts_backbone,
        quantizations=() if trains_base else all_kinds,
        merges=method.merges and not trains_base,
        exports=method.saves,
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mark(yes: bool) -> str:
    return "✓" if yes else "–"
