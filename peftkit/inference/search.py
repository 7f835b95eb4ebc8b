"""Exact search: the texts of a corpus whose vectors have the largest cosine with a query's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftkit.data.problems import shorten
from peftkit.errors import DataError
from peftkit.inference import embed_file, texts
from peftkit.schema.types import Row

CHUNK = 2048
"""Texts of the corpus in memory at a time; of the others only the best are kept."""


def search_file(
    source: str, *, corpus: Path, queries: Sequence[str], top: int = 5, column: str | None = None
) -> list[list[Row]]:
    """For each query the ``top`` rows of ``corpus``, each with its ``score``, the cosine, the best first.

    Args:
        source: a run, an exported folder, or a base model.
        column: of the corpus's texts; None takes the second text of the run's pairs, its text, or ``text``.

    Raises:
        DataError: a file that cannot be read, a missing column, a row without a text, no query.
    """
    if not queries or not all(query.strip() for query in queries):
        raise DataError("expected a query; give one with --query, or one per line on stdin")
    texts.check_files(corpus, None)
    run = embed_file.open_run(source)
    data = run.recipe.data if run else None
    columns = [column or (data.text_pair or data.text if data else "text")]
    rows = texts.InputTexts(corpus, columns, data)
    rows.check()
    model = embed_file.embedder(run or source, None)
    wanted = model.embed(list(queries), normalize=True)
    best: list[list[tuple[float, Row]]] = [[] for _ in queries]
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        vectors = model.embed([str(texts.text_of(row, columns)) for row in chunk], normalize=True)
        for number, scores in enumerate(wanted @ vectors.T):
            order = np.argsort(-scores, kind="stable")[:top]
            merged = best[number] + [(float(scores[place]), chunk[place]) for place in order]
            best[number] = sorted(merged, key=lambda entry: -entry[0])[:top]
    return [[{"score": round(score, 6), **row} for score, row in entries] for entries in best]


def show(queries: Sequence[str], answers: Sequence[Sequence[Row]], *, as_json: bool = False) -> None:
    """Prints the answers: a query with its texts below, or a JSON line for each query."""
    if as_json:
        texts.write_rows(({"query": query, "texts": rows} for query, rows in zip(queries, answers)), None)
        return
    for query, rows in zip(queries, answers):
        print(query)
        for row in rows:
            words = " | ".join(str(value) for name, value in row.items() if name != "score")
            print(f"  {row['score']:.4f}  {shorten(words, 200)}")
