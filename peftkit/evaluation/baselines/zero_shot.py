"""The base model without any training.

Where the head adds no layers, the base answers as it is. Else it is told nothing but the names of the classes: an
encoder's texts go to the class whose description lies nearest (cosine of mean-pooled tokens), a decoder's to the class
whose name it finds likeliest after a prompt. Neither score is a probability: loss and calibration error are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import ModelError
from peftkit.schema.baseline import Baseline, BaselineInputs, BaselineResult
from peftkit.schema.registries import BASELINES

if TYPE_CHECKING:
    import numpy as np

DECODER_ROWS = 200
"""Rows that a decoder's baseline scores at most: every class costs a forward pass over the text."""
NO_PROBABILITIES = ("loss", "calibration_error")


@BASELINES.register("zero_shot")
class ZeroShot(Baseline):
    """What the untrained base can do."""

    def compute(self, inputs: BaselineInputs) -> BaselineResult | None:
        """Scores the base; None for a classifier in shards, which not every process could embed texts with."""
        head = inputs.head
        if not head.adds_layers:
            outputs = inputs.base_outputs()
            metrics = head.metrics(outputs, inputs.recipe.evaluation)
            untrained = ", under new output layers that know nothing yet" if inputs.new_layers else ""
            return BaselineResult(metrics, outputs, note=f"the base model before training{untrained}")
        if inputs.sharded:
            return None
        if reason := _inapplicable(head.class_names()):
            return BaselineResult(note=reason)
        try:
            return _score_names(inputs)
        except ModelError as error:
            return BaselineResult(note=f"skipped: {error}")


def _score_names(inputs: BaselineInputs) -> BaselineResult:
    import numpy as np

    evaluation, labels, note = inputs.recipe.evaluation, inputs.rows["label"], ""
    texts: list[str] = list(inputs.rows["text"])
    rows = np.arange(len(texts))
    if inputs.language_model and len(rows) > DECODER_ROWS:
        rows = np.sort(np.random.Generator(np.random.PCG64(0)).choice(rows, DECODER_ROWS, replace=False))
        note = f"on {DECODER_ROWS} of {len(texts):,} rows"
    scores = _scores(inputs, [texts[row] for row in rows])
    outputs = {"logits": scores, "labels": np.asarray([labels[row] for row in rows])}
    named = [name for name in inputs.head.metric_names(evaluation) if name not in NO_PROBABILITIES]
    metrics = inputs.head.metrics(outputs, evaluation.model_copy(update={"metrics": tuple(named)}))
    return BaselineResult(metrics, outputs, rows, note)


def _scores(inputs: BaselineInputs, texts: list[str]) -> np.ndarray:
    """[texts, classes], higher for a class that fits better."""
    from peftkit.data.batching import EVALUATION_ROWS
    from peftkit.evaluation import zero_shot_scores

    names, limit = inputs.head.class_names(), inputs.recipe.data.max_length
    score = zero_shot_scores.of_decoder if inputs.language_model else zero_shot_scores.of_encoder

    def compute() -> np.ndarray:
        model = inputs.language_model() if inputs.language_model else inputs.backbone
        return score(model, inputs.tokenizer, texts, names, max_length=limit, batch_size=EVALUATION_ROWS)

    code = Path(zero_shot_scores.__file__).read_text(encoding="utf-8")
    return inputs.cached("zero_shot", [texts, names, limit, code], compute)


def _inapplicable(names: tuple[str, ...]) -> str:
    """Why the names of classes say nothing, or the empty string."""
    if not names:
        return "skipped: it needs one label per row"
    empty = [name for name in names if not any(letter.isalpha() for letter in name) or _is_number(name)]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:3])
        return f"skipped: labels such as {shown} say nothing about the texts; name them in data.labels"
    return ""


def _is_number(label: str) -> bool:
    stem = label.lower().removeprefix("label").removeprefix("class").strip("_- ")
    return stem.isdecimal() or stem == ""
