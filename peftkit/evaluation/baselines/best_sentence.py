"""The sentence of the text that shares most words with the question."""

from __future__ import annotations

from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES


@BASELINES.register("best_sentence")
class BestSentence(Baseline):
    """Answers each question with the sentence of its text that shares most words with it."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Scores the head's answers by sentence; None for a head that answers no questions."""
        answers = inputs.head.overlap_outputs(inputs.rows)
        if answers is None:
            return None
        outputs, note = answers
        return BaselineResult(inputs.head.metrics(outputs, inputs.recipe.evaluation), outputs, note=note)
