"""A causal language model's own output: the next token of every scored token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peftkit.schema.head import Head, Outputs, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Prediction, Row

if TYPE_CHECKING:
    import torch

    from peftkit.schema.recipe import EvaluationConfig

NAME = "causal_lm"


@HEADS.register(NAME)
@dataclass(frozen=True)
class CausalLM(Head):
    """Predicts the scored tokens of each example: the loss is their cross-entropy, summed."""

    adds_layers: ClassVar[bool] = False
    scores_tokens: ClassVar[bool] = True
    writes_text: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("zero_shot",)
    model_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    proof_rows: ClassVar[int] = 4
    proof_tokens: ClassVar[int | None] = 64
    """A window may be packed with several documents; its first tokens are a text like any other."""
    pipeline_tag: ClassVar[str] = "text-generation"

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForCausalLM"

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Cross-entropy summed over the scored tokens; ÷ Σ weight is the loss per token."""
        from peftkit.models.kernels import linear_cross_entropy

        return linear_cross_entropy.loss(model, batch)

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``loss``, ``weight`` (scored tokens) and ``correct`` (those predicted right), each [rows] fp32."""
        from peftkit.models.kernels import linear_cross_entropy

        return linear_cross_entropy.row_outputs(model, batch)

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[real tokens, vocabulary]; those of a learned prompt, which stand before the row's own, are left out."""
        inputs = {name: batch[name] for name in self.model_inputs}
        mask = batch["attention_mask"].bool()
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits[:, -mask.shape[1] :].float()[mask]

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        """Tokens without a mask, which padding on the right does not need; ``position_ids`` where rows are packed."""
        import torch

        names = ("input_ids", "labels", *(["position_ids"] if packed else []))
        batch = {name: torch.zeros((rows, tokens), dtype=torch.int64) for name in names}
        return batch | {"weight": torch.ones(rows)}

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss`` per scored token, ``perplexity`` = exp(loss), ``token_accuracy``, and ``tokens`` scored."""
        loss, tokens, correct = (float(outputs[name].sum(dtype="float64")) for name in ("loss", "weight", "correct"))
        loss /= max(tokens, 1.0)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        accuracy = correct / max(tokens, 1.0)
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": accuracy, "tokens": tokens}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        return ("loss", "perplexity", "token_accuracy")

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row, str]:
        """The paired bootstrap of the loss per token."""
        from peftkit.evaluation import paired_tests
        from peftkit.evaluation.resampling import of_loss

        trained, other = (of_loss(one["loss"], one["weight"]) for one in (outputs, baseline))
        test = paired_tests.paired(
            [lambda rows: trained(rows)["loss"]], [lambda rows: other(rows)["loss"]], len(outputs["loss"]),
            confidence=confidence,
        )  # fmt: skip
        return test, paired_tests.verdict(test, name, of_loss=True)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """Where each example begins, its summed loss, and how many tokens were scored."""
        return [
            {"file": row.get("_file"), "line": row.get("_line"), "loss": round(float(loss), 6), "tokens": float(tokens)}
            for row, loss, tokens in zip(rows, outputs["loss"], outputs["weight"], strict=True)
        ]

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        """Losses and metrics of what was generated, and scored tokens as ``gold``: runs are compared on the same."""
        import numpy as np

        from peftkit.evaluation import text_metrics
        from peftkit.evaluation.resampling import of_groups, of_loss

        loss, tokens = (np.array([line[name] for line in lines], dtype=float) for name in ("loss", "tokens"))
        losses, written = of_loss(loss, tokens), [row for row, line in enumerate(lines) if "generated" in line]
        if not written:
            return StoredPredictions(tokens, losses)
        pairs = [(lines[row]["generated"], lines[row]["target"]) for row in written]
        of_texts = of_groups(np.array(written), len(lines), text_metrics.statistics(*zip(*pairs)))
        return StoredPredictions(tokens, lambda rows: {**losses(rows), **of_texts(rows)})

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        return []

    def summary(self) -> str:
        return "continues or answers a text"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return [
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]

    def peftkit_code(self) -> list[str]:
        return ['print(model.generate("Once upon a time", max_new_tokens=64)[0])']
