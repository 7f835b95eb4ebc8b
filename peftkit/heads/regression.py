"""A number per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.classifier import Classifier
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Prediction

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.evaluation.decisions import Decisions


@HEADS.register("regression")
@dataclass(frozen=True)
class Regression(Classifier):
    """Predicts a number; the loss is the squared error."""

    transformers_problem_type: ClassVar[str] = "regression"
    best_metric: ClassVar[str] = "mse"
    default_metrics: ClassVar[tuple[str, ...]] = ("mse", "mae", "pearsonr", "spearmanr", "r2")

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        logits = logits.float()
        return F.mse_loss(logits.squeeze(-1), labels.to(logits), reduction="none")

    def blank_label(self) -> float:
        return 0.0

    def gold(self, labels: np.ndarray) -> np.ndarray:
        """The numbers in fp64."""
        return labels.astype("float64").reshape(len(labels))

    def kind(self) -> type[Decisions]:
        from peftkit.evaluation.decisions import Numbers

        return Numbers

    def prediction(self, logits: torch.Tensor, threshold: float | None) -> Prediction:
        """The number, without a probability."""
        return Prediction(float(logits.reshape(-1)[0]), None, {})

    def constant(self, labels: np.ndarray) -> tuple[np.ndarray, str]:
        import numpy as np

        return np.array([labels.mean()]), f"always {labels.mean():.4g}, the mean of training"

    def class_counts(self, rows: Any) -> dict[str, int]:
        return {}

    def label_text(self, label: Any) -> str:
        return f"{label[0] if isinstance(label, list) else label:g}"

    def summary(self) -> str:
        return "gives a text a number"

    def answer_code(self) -> list[str]:
        return ["print(logits.squeeze(-1).tolist())"]

    def onnx_code(self) -> list[str]:
        return ["print(logits[:, 0].tolist())"]
