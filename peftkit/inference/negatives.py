"""Hard negatives for pairs: for each first text the second texts of other rows that a model takes for the most alike.

What is nearly as alike as the row's own second text is often just as right, so a margin leaves it out: the
positive-aware mining of de Souza Moreira et al. 2024, "NV-Retriever".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from peftkit.errors import DataError
from peftkit.inference import embed_file, texts

CHUNK = 1024
"""First texts whose cosines with all second texts are in memory at a time."""
NAME = "negative"


def mine_file(
    source: str,
    *,
    file: Path,
    out: Path,
    text: str | None = None,
    text_pair: str | None = None,
    count: int = 1,
    margin: float = 0.05,
) -> tuple[int, int]:
    """Writes the rows of ``file`` with ``count`` negatives each; returns how many rows were written and left out.

    Args:
        source: a run, an exported folder, or a base model, by whose vectors texts are compared.
        text, text_pair: columns of the pairs; None takes the run's own.
        margin: a negative's cosine with the first text is at most ``1 − margin`` times that of the row's own second.

    A row with too few second texts below the margin is left out. Neither the first text itself nor anything that some
    row pairs it with is a negative.

    Raises:
        DataError: a file that cannot be read or written, missing columns, a row without a text, no row left.
    """
    texts.check_files(file, out, (".jsonl", *texts.TABLES))
    run = embed_file.open_run(source)
    data = run.recipe.data if run else None
    columns = [text or (data.text if data else "text"), text_pair or (data and data.text_pair) or "text_pair"]
    table = texts.InputTexts(file, columns, data)
    names = table.check()
    added = [NAME] if count == 1 else [f"{NAME}_{number}" for number in range(1, count + 1)]
    if taken := [name for name in added if name in names]:
        raise DataError("the file has this column already; rename it, or leave it out", file=file, column=taken[0])
    rows = list(table)
    model = embed_file.embedder(run or source, None)
    firsts, seconds = ([str(row[column]) for row in rows] for column in columns)
    queries, documents = (_vectors(model, side) for side in (firsts, seconds))
    chosen = hardest(firsts, seconds, queries, documents, count=count, margin=margin)
    complete = [row | dict(zip(added, hard)) for row, hard in zip(rows, chosen) if len(hard) == count]
    if not complete:
        raise DataError(
            f"no row has {count} texts of other rows that are less alike by the margin of {margin:g}; set a smaller "
            "--margin or --count", file=file,
        )  # fmt: skip
    texts.write_rows(complete, out, names)
    return len(complete), len(rows) - len(complete)


def hardest(
    firsts: Sequence[str],
    seconds: Sequence[str],
    queries: np.ndarray,
    documents: np.ndarray,
    *,
    count: int,
    margin: float,
) -> Iterator[list[str]]:
    """For each first text up to ``count`` second texts of other rows, the most alike first.

    Args:
        queries, documents: unit vectors of the first and of the second texts, [rows, width].
    """
    unique = {text: row for row, text in reversed(list(enumerate(seconds)))}  # first row of each text
    words, rows = list(unique), np.array(list(unique.values()))
    place = {text: number for number, text in enumerate(words)}
    belongs = {text: {place[text]} for text in firsts if text in place}
    for first, second in zip(firsts, seconds):
        belongs.setdefault(first, set()).add(place[second])
    for start in range(0, len(firsts), CHUNK):
        cosines = queries[start : start + CHUNK] @ documents[rows].T
        for number, scores in enumerate(cosines, start):
            limit = float(queries[number] @ documents[number])
            scores = np.where(scores <= (1 - margin) * limit, scores, -np.inf)
            scores[list(belongs[firsts[number]])] = -np.inf
            order = np.argsort(-scores, kind="stable")[:count]
            yield [words[one] for one in order if np.isfinite(scores[one])]


def _vectors(model: embed_file.Embedder, side: Sequence[str]) -> np.ndarray:
    """Vectors of texts, each embedded once."""
    unique = list(dict.fromkeys(side))
    place = {text: number for number, text in enumerate(unique)}
    return model.embed(unique, normalize=True)[[place[text] for text in side]]
