"""What heads share that give each row one answer from logits [rows, width]: a new layer over a pooled vector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.schema.head import Head, Outputs, Statistics, StoredPredictions
from peftkit.schema.types import Batch, Prediction, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

    from peftkit.evaluation.decisions import Decisions
    from peftkit.schema.recipe import EvaluationConfig


class Classifier(Head):
    """A head over one vector per row; a kind of answer has to add ``losses``, ``kind``, ``prediction``, ``summary``."""

    pools: ClassVar[bool] = True
    onnx: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-classification"
    transformers_problem_type: ClassVar[Any] = None
    """``problem_type`` of the model's configuration, which names a loss of transformers; None for any other."""
    default_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics where the recipe names none."""

    @abstractmethod
    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each row from its fp32 logits [rows, width] and encoded labels."""

    @abstractmethod
    def kind(self) -> type[Decisions]:
        """The kind of answer, of ``peftkit.evaluation.decisions``."""

    @abstractmethod
    def prediction(self, logits: torch.Tensor, threshold: float | None) -> Prediction:
        """The answer from one row's logits [width] in fp64."""

    def decide(self, logits: np.ndarray) -> Decisions:
        """Answers from logits [rows, width]."""
        return self.kind().from_logits(logits, self.info.labels)

    def gold(self, labels: np.ndarray) -> np.ndarray:
        """Encoded labels in the form of ``Decisions.predicted``."""
        return labels.astype("int64")

    def weight(self, label: Any) -> float:
        """What a row adds to the loss's denominator."""
        return 1.0

    def blank_label(self) -> Any:
        """What stands in for the encoded label of a row that has none."""
        return 0

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        """A sequence classifier; over pooled tokens a token classifier, whose logits are linear in the tokens."""
        return "AutoModelForSequenceClassification" if pooling == "own" else "AutoModelForTokenClassification"

    def configure(self, config: PreTrainedConfig) -> None:
        config.num_labels = self.width
        config.id2label = dict(enumerate(self.info.labels)) or {0: "value"}
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = self.transformers_problem_type

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Loss summed over the rows; ÷ Σ weight is the mean that torch's own loss modules give."""
        from peftkit.models.pooled_logits import logits

        return self.losses(logits(model, batch, pooling), batch["labels"]).sum()

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``logits`` [rows, width], ``labels`` [rows] or [rows, labels], ``loss`` and ``weight`` [rows]."""
        from peftkit.models.pooled_logits import logits

        scores = logits(model, batch, pooling).float()
        losses = self.losses(scores, batch["labels"])
        return {"logits": scores, "labels": batch["labels"], "loss": losses, "weight": batch["weight"].float()}

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[rows, width]: the head on every token first, then their mean."""
        from peftkit.models.pooled_logits import plain_logits

        return plain_logits(model, batch, pooling)

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        import torch

        return {
            "input_ids": torch.zeros((rows, tokens), dtype=torch.int64),
            "attention_mask": torch.ones((rows, tokens), dtype=torch.int64),
            "labels": torch.tensor([self.blank_label()] * rows),
            "weight": torch.ones(rows),
        }

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss`` where it is among the outputs, the metrics of the recipe or ``default_metrics``, ``best_metric``."""
        from peftkit.evaluation.decisions import mean_loss, score

        names = self.default_metrics if evaluation.metrics is None else evaluation.metrics
        metrics = {"loss": mean_loss(outputs)} if "loss" in outputs else {}
        return metrics | score(*self._answers(outputs), [*names, self.best_metric])

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("loss", *(evaluation.metrics or self.default_metrics), self.best_metric)))

    def statistics(self, outputs: Outputs) -> Statistics:
        decided, gold = self._answers(outputs)
        return decided.statistics(gold)

    def right(self, outputs: Outputs) -> np.ndarray | None:
        decided, gold = self._answers(outputs)
        return decided.right(gold)

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        decided, gold = self._answers(outputs)
        return {**decided.details(gold), "mistakes": decided.mistakes(gold, rows, evaluation.worst)}

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """McNemar's test where answers are right or wrong."""
        from peftkit.evaluation import paired_tests

        trained, other = self.right(outputs), self.right(baseline)
        if trained is None or other is None:
            return None, ""
        test = paired_tests.mcnemar(trained, other, confidence)
        return test, paired_tests.verdict(test, name)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """``file``, ``line``, the texts, and ``gold`` and ``predicted`` as names or numbers."""
        decided, gold = self._answers(outputs)
        return [
            {
                "file": row.get("_file"),
                "line": row.get("_line"),
                **{name: row[name] for name in ("text", "text_pair") if name in row},
                **decided.row(number, gold),
            }
            for number, row in enumerate(rows)
        ]

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        kind, labels = self.kind(), self.info.labels
        gold, predicted = (kind.parse([line[name] for line in lines], labels) for name in ("gold", "predicted"))
        decided = kind(predicted, None, labels)
        return StoredPredictions(gold, decided.statistics(gold), decided.right(gold))

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        import numpy as np
        import torch

        logits = (torch.from_numpy(np.asarray(row, dtype=np.float64)) for row in outputs["logits"])
        return [self.prediction(row, threshold) for row in logits]

    def _answers(self, outputs: Outputs) -> tuple[Any, np.ndarray]:
        import numpy as np

        return self.decide(outputs["logits"]), self.gold(np.asarray(outputs["labels"]))

    def constant(self, labels: np.ndarray) -> tuple[np.ndarray, str] | None:
        """Logits [width] that are best for every row, from the canonical labels of training in fp64, and a note."""
        return None

    def constant_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        import numpy as np
        import torch

        constant = self.constant(np.asarray(list(train["label"]), dtype=np.float64))
        if constant is None:
            return None
        gold = np.asarray(list(rows["label"]))
        logits = np.tile(constant[0], (len(gold), 1))
        losses = self.losses(torch.from_numpy(logits), torch.from_numpy(gold)).numpy()
        weights = np.asarray([self.weight(label) for label in gold.tolist()])
        return {"logits": logits, "labels": gold, "loss": losses, "weight": weights}, constant[1]

    def class_counts(self, rows: Any) -> dict[str, int]:
        """Rows of each class; with several labels per row, those that have the label."""
        import numpy as np

        if "label" not in rows.column_names or not self.info.labels:
            return {}
        labels = np.asarray(list(rows["label"]), dtype=np.int64)
        counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(self.info.labels))
        return dict(zip(self.info.labels, counts.tolist()))

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        options = f'truncation=True, max_length={max_length}, padding=True, return_tensors="pt"'
        lines = [
            "inputs = tokenizer(",
            f'    ["a text", "another text"], {options}',
            ")",
            "with torch.no_grad():",
            "    logits = model(**inputs).logits",
        ]
        if pooling == "mean":
            lines += [
                'mask = inputs["attention_mask"].unsqueeze(-1)',
                "logits = (logits * mask).sum(1) / mask.sum(1)  # mean over the tokens: linear in them, like the head",
            ]
        elif pooling == "cls":
            lines.append("logits = logits[:, 0]  # the first token")
        return [*lines, *self.answer_code()]

    def answer_code(self) -> list[str]:
        """Python lines that print an answer from ``logits``, a torch tensor."""
        return ["print(logits.tolist())"]
