"""An ordinal head: output k says whether the rating exceeds k (Frank & Hall 2001; CORAL, arXiv:1901.07884)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peftkit.heads.classifier import Classifier
from peftkit.schema.types import Prediction


@dataclass(frozen=True)
class Ordinal(Classifier):
    """Places a text on an ordered scale of N ratings with N − 1 outputs."""

    best_metric: ClassVar[str] = "within_one"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    baselines: ClassVar[tuple[str, ...]] = ("majority", "middle")

    @property
    def width(self) -> int:
        return len(self.info.labels) - 1

    def configure(self, config):
        config.num_labels = self.width
        config.problem_type = None

    def losses(self, logits, labels):
        import torch
        import torch.nn.functional as F

        exceeded = (labels[:, None] > torch.arange(self.width, device=labels.device)).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, exceeded, reduction="none").sum(1)

    def kind(self):
        from peftkit.evaluation.decisions import Classes

        return Classes

    def decide(self, logits):
        import numpy as np

        exceeded = 1 / (1 + np.exp(-np.sort(np.asarray(logits, dtype=np.float64), axis=1)[:, ::-1]))
        edges = np.hstack([np.ones((len(exceeded), 1)), exceeded, np.zeros((len(exceeded), 1))])
        return self.kind()((exceeded > 0.5).sum(axis=1), -np.diff(edges, axis=1), self.info.labels)

    def prediction(self, logits, threshold):
        decided = self.decide(logits.numpy()[None])
        rating, probabilities = int(decided.predicted[0]), decided.probabilities[0].tolist()
        return Prediction(self.info.labels[rating], probabilities[rating], dict(zip(self.info.labels, probabilities)))

    def metrics(self, outputs, evaluation):
        from peftkit.evaluation.decisions import mean_loss, score

        decided, gold = self.decide(outputs["logits"]), self.gold(outputs["labels"])
        within = float((abs(decided.predicted - gold) <= 1).mean())
        names = evaluation.metrics or self.default_metrics
        loss = {"loss": mean_loss(outputs)} if "loss" in outputs else {}
        return {**loss, **score(decided, gold, names), "within_one": within}

    def constant(self, labels):
        import numpy as np

        share = np.clip([(labels > rating).mean() for rating in range(self.width)], 1e-6, 1 - 1e-6)
        return np.log(share / (1 - share)), "the shares of the training ratings"

    def label_text(self, label: Any) -> str:
        return self.info.labels[label]

    def summary(self) -> str:
        return f"rates a text from 1 to {len(self.info.labels)}"

    def answer_code(self) -> list[str]:
        return ["print([int((row > 0).sum()) + 1 for row in logits])"]

    def onnx_code(self) -> list[str]:
        return ["print(((logits > 0).sum(1) + 1).tolist())"]
