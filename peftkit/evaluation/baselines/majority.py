"""The same answer for every row: the commonest class, each label's share, or the mean."""

from __future__ import annotations

from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES


@BASELINES.register("majority")
class Majority(Baseline):
    """Gives every row what is commonest in training."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Scores the head's constant answer; None where the head has none."""
        constant = inputs.head.constant_outputs(inputs.train, inputs.rows)
        if constant is None:
            return None
        outputs, note = constant
        return BaselineResult(inputs.head.metrics(outputs, inputs.recipe.evaluation), outputs, note=note)
