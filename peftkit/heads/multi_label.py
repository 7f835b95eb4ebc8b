"""Any number of labels per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.classifier import Classifier
from peftkit.schema.head import StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Prediction, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.evaluation.decisions import LabelSets


@HEADS.register("multi_label_classification")
@dataclass(frozen=True)
class MultiLabel(Classifier):
    """Decides on each label; the loss is the binary cross-entropy averaged over labels."""

    threshold: float = 0.5
    """Probability from which a label counts as given."""

    transformers_problem_type: ClassVar[str] = "multi_label_classification"
    best_metric: ClassVar[str] = "f1_micro"
    default_metrics: ClassVar[tuple[str, ...]] = (
        "f1_micro", "f1", "precision", "recall", "exact_match", "hamming_loss",
    )  # fmt: skip

    def blank_label(self) -> list[float]:
        return [0.0] * len(self.info.labels)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean binary cross-entropy of each row's labels; class weights weigh the positives."""
        import torch.nn.functional as F

        logits = logits.float()
        weights = None if self.info.class_weights is None else logits.new_tensor(self.info.class_weights)
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits), pos_weight=weights, reduction="none")
        return each.mean(dim=-1)

    def kind(self) -> type[LabelSets]:
        from peftkit.evaluation.decisions import LabelSets

        return LabelSets

    def decide(self, logits: np.ndarray) -> LabelSets:
        return self.kind().from_logits(logits, self.info.labels, self.threshold)

    def prediction(self, logits: torch.Tensor, threshold: float | None) -> Prediction:
        """The labels over the threshold, and the probability of the least certain of them."""
        threshold = self.threshold if threshold is None else threshold
        each = logits.sigmoid().tolist()
        given = tuple(label for label, value in zip(self.info.labels, each) if value >= threshold)
        least = min((value for value in each if value >= threshold), default=1 - max(each))
        return Prediction(given, least, dict(zip(self.info.labels, each)))

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        """Compared by the bootstrap, whose metrics also count labels that are partly right."""
        return replace(super().read_predictions(lines), right=None)

    def constant(self, labels: np.ndarray) -> tuple[np.ndarray, str]:
        import numpy as np

        share = np.clip(labels.mean(axis=0), 1e-6, 1 - 1e-6)
        return np.log(share / (1 - share)), "each label's share in training"

    def label_text(self, label: Any) -> str:
        """The names of the labels given."""
        return ", ".join(name for name, given in zip(self.info.labels, label) if given) or "none"

    def summary(self) -> str:
        return f"says which of {len(self.info.labels)} labels hold for a text"

    def answer_code(self) -> list[str]:
        return ["print(logits.sigmoid().tolist())"]

    def onnx_code(self) -> list[str]:
        return ["print((1 / (1 + np.exp(-logits))).tolist())"]
