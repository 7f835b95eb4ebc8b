"""Texts that find those that belong to them: the second of a pair, or others of the same class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.embedding import Embedding, names_of
from peftkit.schema.head import Outputs, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.schema.recipe import EvaluationConfig


@dataclass(frozen=True)
class Search:
    """What the held-out texts find among each other."""

    queries: np.ndarray
    """Row of each query: rows with the same first text are one."""
    values: dict[str, np.ndarray]
    """Metrics by query."""
    first: np.ndarray
    """Row in which the first document found stands."""


@dataclass(frozen=True)
class RankedTexts(Embedding):
    """What both kinds share: retrieval metrics of ``peftkit.evaluation.retrieval``."""

    best_metric: ClassVar[str] = "ndcg"
    known_metrics: ClassVar[tuple[str, ...]] = (
        "accuracy_at_1", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "ndcg", "map",
    )  # fmt: skip

    @abstractmethod
    def search(self, outputs: Outputs, width: int | None = None) -> Search:
        """Every query's metrics."""

    def measured(self, outputs: Outputs, width: int | None = None) -> Any:
        from peftkit.evaluation import resampling
        from peftkit.evaluation.retrieval import means

        result = self.search(outputs, width)
        return resampling.of_groups(
            result.queries, len(outputs["weight"]), lambda queries: means(result.values, queries)
        )

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """The queries that find what belongs to them last."""
        import numpy as np

        result = self.search(outputs)
        order = np.argsort(result.values["ndcg"], kind="stable").tolist()
        worst = [one for one in order if not result.values["accuracy_at_1"][one]]
        return {
            "mistakes": [
                self._mistake(rows[int(result.queries[one])], rows[int(result.first[one])], result.values["ndcg"][one])
                for one in worst[: evaluation.worst]
            ]
        }

    def _mistake(self, query: Row, answer: Row, ndcg: float) -> Row:
        return {
            "text": query["text"], "gold": self.wanted(query), "predicted": self.shown(answer),
            "error": 1 - float(ndcg), "file": query.get("_file"), "line": query.get("_line"),
        }  # fmt: skip

    def wanted(self, row: Row) -> str:
        """What a query should find, in words."""
        return str(row["text_pair"])

    def shown(self, row: Row) -> str:
        """A document, in words."""
        return str(row["text_pair"])

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """``file``, ``line`` and the metrics of each row's query; rows that repeat a query have none."""
        result = self.search(outputs)
        place = {int(row): number for number, row in enumerate(result.queries)}
        return [
            {"file": row.get("_file"), "line": row.get("_line"), "metrics": {
                name: round(float(values[place[number]]), 6) for name, values in result.values.items()
            } if number in place else None}
            for number, row in enumerate(rows)
        ]  # fmt: skip

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        import numpy as np

        from peftkit.evaluation.retrieval import means

        values = {
            name: np.array([line["metrics"][name] if line["metrics"] else np.nan for line in lines])
            for name in self.known_metrics
        }
        known = np.array([line["metrics"] is not None for line in lines])
        return StoredPredictions(known.astype(int), lambda rows: means(values, rows[known[rows]]))


@HEADS.register("text_pairs")
@dataclass(frozen=True)
class TextPairs(RankedTexts):
    """Each first text finds its second among all others; the loss is multiple negatives ranking."""

    def row_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        from peftkit.heads.layers.similarity_losses import ranking

        return ranking(vectors, batch["texts"], self.scale, symmetric=self.symmetric)

    def search(self, outputs: Outputs, width: int | None = None) -> Search:
        """First texts among the second and further texts of all rows, each once."""
        import numpy as np

        from peftkit.evaluation.retrieval import score

        names, vectors = names_of(outputs), self.texts_of(outputs, width)
        documents, where = np.unique(names[:, 1:], return_index=True)
        number = {name: place for place, name in enumerate(documents.tolist())}
        places = np.stack([where // (names.shape[1] - 1), where % (names.shape[1] - 1) + 1])
        wanted: dict[int, set[int]] = {}
        for query, positive in names[:, :2].tolist():
            wanted.setdefault(query, set()).add(number[positive])
        _, queries = np.unique(names[:, 0], return_index=True)
        queries = np.sort(queries)
        relevant = [wanted[query] for query in names[queries, 0].tolist()]
        values, first = score(vectors[queries, 0], vectors[places[0], places[1]], relevant)
        return Search(queries, values, places[0][first])

    def label_text(self, label: Any) -> str:
        """Nothing: the pair is all there is."""
        return ""


@HEADS.register("labeled_texts")
@dataclass(frozen=True)
class LabeledTexts(RankedTexts):
    """Texts of a class find each other; the loss is supervised contrastive."""

    def row_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        from peftkit.heads.layers.similarity_losses import supervised_contrastive

        return supervised_contrastive(vectors, batch["labels"], self.scale)

    def search(self, outputs: Outputs, width: int | None = None) -> Search:
        """Every text among all others; those of a class without another text are left out."""
        import numpy as np

        from peftkit.evaluation.retrieval import score

        labels, vectors = np.asarray(outputs["labels"]).astype(int), self.texts_of(outputs, width)[:, 0]
        members = {label: set(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
        queries = np.array([row for row, label in enumerate(labels.tolist()) if len(members[label]) > 1], dtype=int)
        relevant = [members[labels[row]] - {row} for row in queries.tolist()]
        values, first = score(vectors[queries], vectors, relevant, queries.tolist())
        return Search(queries, values, first)

    def wanted(self, row: Row) -> str:
        return f"another text of {self.info.labels[row['label']]}"

    def shown(self, row: Row) -> str:
        return f"{self.info.labels[row['label']]}: {row['text']}"

    def class_counts(self, rows: Any) -> dict[str, int]:
        import numpy as np

        if "label" not in rows.column_names:
            return {}
        counts = np.bincount(np.asarray(list(rows["label"])), minlength=len(self.info.labels))
        return dict(zip(self.info.labels, counts.tolist()))

    def label_text(self, label: Any) -> str:
        return self.info.labels[int(label)]
