"""The beginning of the source: hard to beat for summaries of news (Nallapati et al. 2017, arXiv:1611.04230)."""

from __future__ import annotations

from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES


@BASELINES.register("lead")
class Lead(Baseline):
    """Gives the first sentences of the source as its summary."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Text metrics on the rows that the trained model generates, too; None for a head that reads no source."""
        from peftkit.evaluation import text_metrics
        from peftkit.evaluation.samples import chosen_rows

        if not inputs.head.writes_text:
            return None
        task, config = inputs.recipe.task, inputs.recipe.evaluation.generation
        chosen = chosen_rows(inputs.rows, task, config)
        lead = inputs.head.lead_texts(inputs.train, inputs.rows.select(list(chosen)))
        if lead is None:
            return None
        texts, note = lead
        if not chosen:
            return BaselineResult(note="skipped: it needs evaluation.generation.test_rows or samples")
        metrics = text_metrics.score(texts, [str(sample.reference) for sample in chosen.values()])
        return BaselineResult(metrics, note=f"{note} of the source")
