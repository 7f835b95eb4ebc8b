"""A masked language model's own output: the tokens that a text hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.causal_lm import CausalLM
from peftkit.heads.masks import IGNORE, Masking
from peftkit.schema.head import Outputs, Statistics
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Candidate, Filled, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import EvaluationConfig

NAME = "masked_lm"
METRICS = ("pseudo_perplexity", "token_accuracy", "tokens")


@HEADS.register(NAME)
@dataclass(frozen=True)
class MaskedLM(CausalLM):
    """Predicts the hidden tokens of each example: the loss is their cross-entropy, summed."""

    completes: ClassVar[bool] = True
    predicts_next: ClassVar[bool] = False
    writes_text: ClassVar[bool] = False
    fills_masks: ClassVar[bool] = True
    model_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "token_type_ids", "attention_mask")
    pipeline_tag: ClassVar[str] = "fill-mask"

    masking: Masking = field(default_factory=Masking)
    candidates: int = 5
    """Tokens that are predicted for each mask."""
    key: tuple[int, ...] = ()
    """Seed and epoch of the masks in training; empty for held-out rows, whose masks stay the same."""

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForMaskedLM"

    # -- training --------------------------------------------------------------------------------------------------

    def for_epoch(self, seed: int, epoch: int) -> MaskedLM:
        return replace(self, key=(seed, epoch))

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Padded rows with some tokens hidden; rows that are to be filled (``masks``) as they are."""
        import torch

        from peftkit.data.batching import collate

        if "words" not in columns:
            return None
        if "masks" in columns:
            return collate(columns, tokenizer) | {"masks": torch.tensor(list(columns["masks"]))}
        return collate(self._hidden(columns, tokenizer), tokenizer)

    def _hidden(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        rows = zip(columns["input_ids"], columns["words"], strict=True)
        pairs = [self.masking.hide(ids, words, tokenizer, self.key) for ids, words in rows]
        inputs, labels = (list(column) for column in zip(*pairs))
        weights = [float(sum(label != IGNORE for label in row)) for row in labels]
        return {**columns, "input_ids": inputs, "labels": labels, "weight": weights}

    def row_weights(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Sequence[float]:
        """The hidden tokens of each row: whole words do not always fill the same number."""
        drawn = self._hidden(columns, tokenizer) if self.masking.whole_word else columns
        return list(drawn["weight"])

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Cross-entropy summed over the hidden tokens; ÷ Σ weight is the loss per token."""
        from peftkit.models.kernels import linear_cross_entropy

        return linear_cross_entropy.loss(model, batch, next_token=False)

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``loss``, ``weight`` (hidden tokens) and ``correct`` (those predicted right), each [rows] fp32.

        Of rows that are to be filled, ``ids`` and ``probabilities`` of the candidates instead, [rows, most masks of a
        row × candidates], padded with -100.
        """
        import torch

        from peftkit.models.kernels import linear_cross_entropy

        if "masks" not in batch:
            return linear_cross_entropy.row_outputs(model, batch, next_token=False)
        values, ids, rows = linear_cross_entropy.likeliest(model, batch, self.candidates, next_token=False)
        most = int(batch["masks"].max()) * self.candidates
        shape = (len(batch["masks"]), most)
        outputs = {name: torch.full(shape, float(IGNORE), device=values.device) for name in ("ids", "probabilities")}
        for row in range(shape[0]):
            for name, tensor in (("ids", ids), ("probabilities", values)):
                own = tensor[rows == row].flatten().float()
                outputs[name][row, : len(own)] = own
        weight = batch["weight"].float()
        return outputs | {"loss": torch.zeros_like(weight), "weight": weight}

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[real tokens, vocabulary]; those of a learned prompt, which stand before the row's own, are left out."""
        from peftkit.models.pooled_logits import model_inputs

        mask = batch["attention_mask"].bool()
        logits: torch.Tensor = model(**model_inputs(model, batch)).logits
        return logits[:, -mask.shape[1] :].float()[mask]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss`` per hidden token, ``pseudo_perplexity`` = exp(loss), ``token_accuracy``, and ``tokens`` hidden.

        Salazar et al. 2020 (arXiv:1910.14659) hide one token at a time, which takes a forward pass per token; here
        the share of ``task.mask_probability`` is hidden at once, the same tokens in every evaluation.
        """
        values = super().metrics(outputs, evaluation)
        values["pseudo_perplexity"] = values.pop("perplexity")
        return {name: values[name] for name in self.metric_names(evaluation)}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        from peftkit.errors import RecipeError, did_you_mean

        for name in evaluation.metrics or ():
            if name not in METRICS and name != "loss":
                hint = did_you_mean(name, METRICS)
                raise RecipeError(f"evaluation.metrics: no metric '{name}' of masked language modeling: {hint}")
        return tuple(dict.fromkeys(("loss", *(METRICS if evaluation.metrics is None else evaluation.metrics))))

    def statistics(self, outputs: Outputs) -> Statistics:
        import numpy as np

        loss, tokens, correct = (np.asarray(outputs[name], dtype=float) for name in ("loss", "weight", "correct"))

        def statistics(rows: np.ndarray) -> dict[str, float]:
            total = max(float(tokens[rows].sum()), 1.0)
            with np.errstate(over="ignore"):
                perplexity = float(np.exp(loss[rows].sum() / total))
            return {"pseudo_perplexity": perplexity, "token_accuracy": float(correct[rows].sum()) / total}

        return statistics

    def answers(
        self, outputs: Outputs, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, threshold: float | None = None
    ) -> list[Filled]:
        """The likeliest tokens for each mask of each text."""
        filled = []
        for ids, probabilities in zip(outputs["ids"], outputs["probabilities"], strict=True):
            known = [
                Candidate(str(tokenizer.decode([int(token)])), float(probability))
                for token, probability in zip(ids, probabilities) if token != IGNORE
            ]  # fmt: skip
            step = self.candidates
            filled.append(Filled(tuple(tuple(known[start : start + step]) for start in range(0, len(known), step))))
        return filled

    # -- the model card --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        return "predicts the words that a text hides, and reads texts of its domain"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return [
            "from transformers import pipeline",
            'fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)',
            'print(fill(f"the {tokenizer.mask_token} of the year"))',
        ]

    def peftkit_code(self) -> list[str]:
        return [
            'text = f"the {model.tokenizer.mask_token} of the year"',
            "for candidate in model.predict(text)[0].masks[0]:",
            "    print(candidate.token, candidate.probability)",
        ]
