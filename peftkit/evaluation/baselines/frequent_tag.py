"""The commonest tag of each word in training; for words that training lacks O, or without it the commonest tag."""

from __future__ import annotations

from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES


@BASELINES.register("frequent_tag")
class FrequentTag(Baseline):
    """Gives each word the tag that it has most often in training."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Scores the head's answers by word; None where the head has none."""
        known = inputs.head.lookup_outputs(inputs.train, inputs.rows)
        if known is None:
            return None
        outputs, note = known
        return BaselineResult(inputs.head.metrics(outputs, inputs.recipe.evaluation), outputs, note=note)
