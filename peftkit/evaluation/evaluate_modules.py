"""peftkit's own metrics as modules of the ``evaluate`` library, for its batching and its gathering over processes.

Runs do not need them: they compute metrics directly and are spared the import of ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

FEATURES = {
    "classes": datasets.Value("int64"),
    "sets": datasets.Sequence(datasets.Value("int64")),
    "numbers": datasets.Value("float64"),
    "texts": datasets.Value("string"),
}
"""What a prediction is."""


class Module(evaluate.Metric):
    """An evaluate module over a function of predictions and references.

    Args:
        compute: ``(predictions, references, **options)`` to values by name.
        holds: what a prediction and a reference are, of ``FEATURES``.
        description: what they measure.
        paper: where they come from.
        options: of ``evaluate.Metric``, such as ``num_process`` and ``keep_in_memory``.
    """

    def __init__(
        self, compute: Callable[..., dict[str, float]], holds: str, description: str, paper: str, **options: Any
    ) -> None:
        self._function, self._description, self._paper = compute, description, paper
        super().__init__(config_name=holds, **options)

    def _info(self) -> evaluate.MetricInfo:
        feature = FEATURES[self.config_name]
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._paper,
            inputs_description="predictions and references of the same length",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, *, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return self._function(predictions, references, **options)

    def _build_data_dir(self) -> str:
        """The folder of the gathered predictions; none is created where they stay in memory."""
        return "" if self.keep_in_memory else super()._build_data_dir()
