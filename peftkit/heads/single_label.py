"""One label of several per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.classifier import Classifier
from peftkit.schema.head import Outputs
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, LoadedModel, Prediction, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.evaluation.decisions import Classes


@HEADS.register("single_label_classification")
@dataclass(frozen=True)
class SingleLabel(Classifier):
    """Chooses one label; the loss is the cross-entropy, with class weights and label smoothing as torch has them."""

    label_smoothing: float = 0.0
    cosine_temperature: float | None = None

    transformers_problem_type: ClassVar[str] = "single_label_classification"
    best_metric: ClassVar[str] = "accuracy"
    default_metrics: ClassVar[tuple[str, ...]] = (
        "accuracy", "precision", "recall", "f1", "f1_weighted", "matthews_correlation", "calibration_error",
    )  # fmt: skip

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row, multiplied by the weight of its class."""
        import torch.nn.functional as F

        logits = logits.float()
        weights = None if self.info.class_weights is None else logits.new_tensor(self.info.class_weights)
        return F.cross_entropy(
            logits, labels.long(), weight=weights, label_smoothing=self.label_smoothing, reduction="none"
        )

    def kind(self) -> type[Classes]:
        from peftkit.evaluation.decisions import Classes

        return Classes

    def prediction(self, logits: torch.Tensor, threshold: float | None) -> Prediction:
        """The likeliest label with its probability."""
        import numpy as np

        each = logits.softmax(-1).tolist()
        best = int(np.argmax(each))
        return Prediction(self.info.labels[best], each[best], dict(zip(self.info.labels, each)))

    def weight(self, label: Any) -> float:
        """The weight of the row's class, as torch's weighted mean has it."""
        return 1.0 if self.info.class_weights is None else self.info.class_weights[int(label)]

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """Starts a head of cosines from rows; raises RecipeError where the model has no layer for it."""
        if self.cosine_temperature is not None:
            from peftkit.heads.layers import cosine

            cosine.start(loaded, batches, self.info, self.cosine_temperature)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """With the probability of the predicted label."""
        confidence = self.kind().from_logits(outputs["logits"], self.info.labels).confidence.tolist()
        lines = super().prediction_rows(outputs, rows)
        return [{**line, "probability": round(value, 6)} for line, value in zip(lines, confidence)]

    def constant(self, labels: np.ndarray) -> tuple[np.ndarray, str]:
        import numpy as np

        counts = np.bincount(labels.astype(int), minlength=len(self.info.labels))
        note = f"always '{self.info.labels[int(counts.argmax())]}', the commonest class of training"
        return np.log(np.maximum(counts, 1e-6) / counts.sum()), note

    def class_names(self) -> tuple[str, ...]:
        return self.info.labels

    def label_text(self, label: Any) -> str:
        return self.info.labels[label] if 0 <= label < len(self.info.labels) else str(label)

    def summary(self) -> str:
        return f"chooses one of {len(self.info.labels)} labels for a text"

    def answer_code(self) -> list[str]:
        return ["print([model.config.id2label[index] for index in logits.argmax(-1).tolist()])"]

    def onnx_code(self) -> list[str]:
        return [f"labels = {list(self.info.labels)!r}", "print([labels[index] for index in logits.argmax(-1)])"]
