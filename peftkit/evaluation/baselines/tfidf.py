"""The words that texts share, weighted by how rare they are: TF-IDF (Salton & Buckley 1988)."""

from __future__ import annotations

from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES


@BASELINES.register("tfidf")
class TfIdf(Baseline):
    """Scores a text by the words that it shares with the query, rare ones more than common ones."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Scores the head's answers by words; None for a head that compares no texts."""
        scored = inputs.head.tfidf_outputs(inputs.train, inputs.rows)
        if scored is None:
            return None
        outputs, note = scored
        return BaselineResult(inputs.head.metrics(outputs, inputs.recipe.evaluation), outputs, note=note)
