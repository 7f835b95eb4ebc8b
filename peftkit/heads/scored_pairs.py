"""How alike two texts are, learned from a number for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.embedding import Embedding
from peftkit.schema.head import Outputs, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.schema.recipe import EvaluationConfig

PAIRS = 500


@HEADS.register("scored_pairs")
@dataclass(frozen=True)
class ScoredPairs(Embedding):
    """Puts the cosines of pairs in the order of their scores (cosent), or equal to them (mse)."""

    best_metric: ClassVar[str] = "spearmanr"
    known_metrics: ClassVar[tuple[str, ...]] = ("spearmanr", "pearsonr")

    def row_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        from peftkit.heads.layers import similarity_losses as losses

        scores = batch["labels"].to(vectors)
        if self.loss_name == "mse":
            return losses.cosine_mse(vectors, scores)
        return losses.cosent(vectors, scores, self.scale)

    def measured(self, outputs: Outputs, width: int | None = None) -> Any:
        import numpy as np

        from peftkit.evaluation import resampling

        known = resampling.of_numbers(np.asarray(outputs["labels"], dtype=float), self.cosines(outputs, width))

        def measured(rows: np.ndarray) -> dict[str, float]:
            values = known(rows)
            return {name: values[name] for name in self.known_metrics}

        return measured

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """Score and cosine of pairs, and the pairs whose cosine is farthest from what their score leads to expect."""
        import numpy as np

        scores, cosines = np.asarray(outputs["labels"], dtype=float), self.cosines(outputs)
        chosen = np.linspace(0, len(scores) - 1, min(PAIRS, len(scores))).astype(int)
        slope, offset = np.polyfit(scores, cosines, 1) if np.ptp(scores) else (0.0, float(cosines.mean()))
        errors = cosines - (slope * scores + offset)
        worst = np.argsort(-np.abs(errors), kind="stable")[: evaluation.worst].tolist()
        return {
            "pairs": [[float(scores[row]), float(cosines[row])] for row in chosen],
            "mistakes": [
                {
                    "text": f"{rows[row]['text']} | {rows[row]['text_pair']}", "gold": float(scores[row]),
                    "predicted": round(float(cosines[row]), 4), "error": float(errors[row]),
                    "file": rows[row].get("_file"), "line": rows[row].get("_line"),
                }
                for row in worst
            ],
        }  # fmt: skip

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """``file``, ``line``, the score as ``gold`` and the cosine as ``predicted``."""
        return [
            {"file": row.get("_file"), "line": row.get("_line"), "gold": float(score), "predicted": float(cosine)}
            for row, score, cosine in zip(rows, outputs["labels"], self.cosines(outputs), strict=True)
        ]

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        import numpy as np

        from peftkit.evaluation import resampling

        gold, predicted = (np.array([line[name] for line in lines], dtype=float) for name in ("gold", "predicted"))
        return StoredPredictions(gold, resampling.of_numbers(gold, predicted))
