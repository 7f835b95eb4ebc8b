"""The table of methods: the models and weights that each supports, and whether it merges.

Everything is read from the methods' classes, which refuse the combinations that the table leaves empty.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peftkit.schema.registries import METHODS, QUANTIZATIONS


@dataclass(frozen=True)
class TableRow:
    """One method."""

    kind: str
    summary: str  # first line of the class's docstring
    paper: str
    learning_rate: float  # the default
    classifier: bool  # on an encoder
    decoder_classifier: bool  # on a decoder, pooled at the last token
    language_model: bool
    quantizations: tuple[str, ...]  # supported kinds, besides unquantized weights
    merges: bool
    exports: str  # adapter, or model


def rows() -> list[TableRow]:
    """Every registered method, by kind; imports neither torch nor peft."""
    kinds = tuple(QUANTIZATIONS.names())
    return [
        TableRow(
            kind=kind,
            summary=(method.__doc__ or "").strip().splitlines()[0].rstrip("."),
            paper=method.paper,
            learning_rate=method.default_learning_rate,
            classifier=True,
            decoder_classifier=method.keeps_token_ids,
            language_model=method.adapts_backbone,
            quantizations=kinds if method.quantizations is None else method.quantizations,
            merges=method.merges and method.saves == "adapter",
            exports=method.saves,
        )
        for kind, method in ((kind, METHODS.get(kind)) for kind in METHODS)
    ]


def as_json() -> list[dict[str, Any]]:
    """The table as plain values."""
    return [asdict(row) for row in rows()]


def text() -> str:
    """Kind and summary, one line per method."""
    table = rows()
    width = max(len(row.kind) for row in table)
    return "\n".join(f"{row.kind:<{width}}  {row.summary}" for row in table)


def markdown() -> str:
    """The table with a column per kind of weights."""
    kinds = QUANTIZATIONS.names()
    columns = ["method", "summary", "learning rate", "classifier", "decoder's classifier", "language model"]
    columns += ["unquantized", *kinds, "merges", "exports"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows():
        summary = f"[{row.summary}]({row.paper})" if row.paper else row.summary
        supported = [row.classifier, row.decoder_classifier, row.language_model, True]
        supported += [*(kind in row.quantizations for kind in kinds), row.merges]
        marks = ["✓" if mark else "–" for mark in supported]
        lines.append([f"`{row.kind}`", summary, f"{row.learning_rate:g}", *marks, row.exports])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
