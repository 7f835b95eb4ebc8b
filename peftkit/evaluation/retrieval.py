"""How well queries find what is relevant to them: by the cosine of vectors, or in lists that were ordered by scores.

Definitions are those of sentence-transformers' InformationRetrievalEvaluator: MRR and nDCG (Järvelin & Kekäläinen 2002)
within the first 10, average precision within the first 100; and of its CrossEncoderRerankingEvaluator for lists, whose
average precision has no limit, and whose nDCG takes the relevance itself as the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

METRICS = ("accuracy_at_1", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "ndcg", "map")
OF_LISTS = ("accuracy_at_1", "mrr", "ndcg", "map")
TOP, DEEP = 10, 100
CHUNK = 512
_DISCOUNTS = 1 / np.log2(np.arange(TOP) + 2)


def score(
    queries: np.ndarray, corpus: np.ndarray, relevant: Sequence[Set[int]], own: Sequence[int] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each metric for each query, and the first document found for it.

    Args:
        queries: unit vectors [queries, width].
        corpus: unit vectors [documents, width].
        relevant: the documents that each query should find, at least one.
        own: a document of each query that is the query itself, and is not searched; -1 for none.
    """
    values = {name: np.zeros(len(queries)) for name in METRICS}
    first = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ corpus.T
        for row, scores in enumerate(similarity, start):
            if own is not None and own[row] >= 0:
                scores[own[row]] = -np.inf
            order = _largest(scores, DEEP)
            hits = np.array([document in relevant[row] for document in order.tolist()], dtype=bool)
            first[row] = order[0]
            for name, value in _of_query(hits, len(relevant[row])).items():
                values[name][row] = value
    return values, first


def of_list(gains: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """The metrics of one query's texts, at least one of them relevant.

    Args:
        gains: how relevant each text is, in the order of the list, [texts], none below 0.
        relevant: whether each counts as relevant, [texts].
    """
    places = np.flatnonzero(relevant)
    top, best = gains[:TOP], -np.sort(-gains)[:TOP]
    discounts = _DISCOUNTS[: len(top)]
    return {
        "accuracy_at_1": float(relevant[0]),
        "mrr": 1 / (places[0] + 1.0) if places[0] < TOP else 0.0,
        "ndcg": float((top * discounts).sum() / (best * discounts).sum()),
        "map": float(((np.arange(len(places)) + 1) / (places + 1)).mean()),
    }


def _of_query(hits: np.ndarray, relevant: int) -> dict[str, float]:
    """The metrics of one query from whether each document in order is relevant."""
    places = np.flatnonzero(hits)
    top = places[places < TOP]
    return {
        "accuracy_at_1": float(hits[0]),
        **{f"recall_at_{count}": float(hits[:count].sum()) / relevant for count in (1, 5, 10)},
        "mrr": 1 / (places[0] + 1.0) if len(top) else 0.0,
        "ndcg": float(_DISCOUNTS[top].sum() / _DISCOUNTS[: min(relevant, TOP)].sum()),
        "map": float(((np.arange(len(places)) + 1) / (places + 1)).sum() / min(relevant, DEEP)),
    }


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the largest scores, in order; of equal ones the first."""
    if len(scores) > count:
        threshold = np.partition(scores, -count)[-count]
        chosen = np.flatnonzero(scores >= threshold)
        return chosen[np.argsort(-scores[chosen], kind="stable")][:count]
    return np.argsort(-scores, kind="stable")


def means(values: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """The mean of each metric over some queries."""
    return {name: float(each[rows].mean()) if len(rows) else float("nan") for name, each in values.items()}
