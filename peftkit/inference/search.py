"""Exact search: the texts of a corpus whose vectors have the largest cosine with a query's.

A reranker can order the best of them again: it reads query and text together, which is better and slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftkit.data.problems import shorten
from peftkit.errors import DataError, RunError
from peftkit.export.folder import ExportFolder, open_export
from peftkit.inference import embed_file, texts, trained_model
from peftkit.schema.types import Row

SCORES = ("score", "cosine")
"""What search adds to the rows of a corpus."""
CHUNK = 2048
"""Texts of the corpus in memory at a time; of the others only the best are kept."""


def search_file(
    source: str,
    *,
    corpus: Path,
    queries: Sequence[str],
    top: int = 5,
    column: str | None = None,
    rerank: Path | None = None,
    candidates: int = 50,
) -> list[list[Row]]:
    """For each query the ``top`` rows of ``corpus``, each with its ``score``, the cosine, the best first.

    Columns of the corpus with that name, or named ``cosine``, get the prefix ``corpus_``.

    Args:
        source: a run, an exported folder, or a base model.
        column: of the corpus's texts; None takes the second text of the run's pairs, its text, or ``text``.
        rerank: a run of reranking, whose scores order the ``candidates`` rows with the largest cosines; the cosine is
            then ``cosine``.

    Raises:
        DataError: a file that cannot be read, a missing column, a row without a text, no query.
        RunError: ``rerank`` is no run of reranking.
    """
    if not queries or not all(query.strip() for query in queries):
        raise DataError("expected a query; give one with --query, or one per line on stdin")
    texts.check_files(corpus, None)
    reranker = _open_reranker(rerank) if rerank is not None else None
    run = embed_file.open_run(source)
    data = run.recipe.data if run else None
    columns = [column or (data.text_pair or data.text if data else "text")]
    rows = texts.InputTexts(corpus, columns, data)
    rows.check()
    model = embed_file.embedder(run or source, None)
    count = max(top, candidates) if reranker else top
    wanted = model.embed(list(queries), normalize=True)
    best: list[list[tuple[float, Row]]] = [[] for _ in queries]
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        vectors = model.embed([str(texts.text_of(row, columns)) for row in chunk], normalize=True)
        for number, scores in enumerate(wanted @ vectors.T):
            order = np.argsort(-scores, kind="stable")[:count]
            merged = best[number] + [(float(scores[place]), chunk[place]) for place in order]
            best[number] = sorted(merged, key=lambda entry: -entry[0])[:count]
    answers = [[{"score": round(score, 6), **_renamed(row)} for score, row in entries] for entries in best]
    return _reranked(reranker, queries, answers, columns, top) if reranker else answers


def _renamed(row: Row) -> Row:
    """The row of the corpus, with ``corpus_`` before the names of its own columns ``score`` and ``cosine``."""
    return {f"corpus_{name}" if name in SCORES else name: value for name, value in row.items()}


def _open_reranker(path: Path) -> ExportFolder:
    export = open_export(path)
    if not export.manifest.head.ranks:
        raise RunError(f"{path}: expected a run of task.kind=reranking, found task.kind={export.recipe.task.kind}")
    return export


def _reranked(
    export: ExportFolder, queries: Sequence[str], answers: list[list[Row]], columns: Sequence[str], top: int
) -> list[list[Row]]:
    """The first ``top`` rows of each answer by the reranker's scores."""
    model = trained_model.load(export)
    reranked = []
    for query, rows in zip(queries, answers, strict=True):
        scores = model.predict([(query, str(texts.text_of(row, columns))) for row in rows])
        order = sorted(range(len(rows)), key=lambda place: scores[place].rank)[:top]
        reranked.append([
            {"score": round(scores[place].score, 6), "cosine": rows[place]["score"],
             **{name: value for name, value in rows[place].items() if name != "score"}}
            for place in order
        ])  # fmt: skip
    return reranked


def show(queries: Sequence[str], answers: Sequence[Sequence[Row]], *, as_json: bool = False) -> None:
    """Prints the answers: a query with its texts below, or a JSON line for each query."""
    if as_json:
        texts.write_rows(({"query": query, "texts": rows} for query, rows in zip(queries, answers)), None)
        return
    for query, rows in zip(queries, answers):
        print(query)
        for row in rows:
            words = " | ".join(str(value) for name, value in row.items() if name not in SCORES)
            print(f"  {row['score']:.4f}  {shorten(words, 200)}")
