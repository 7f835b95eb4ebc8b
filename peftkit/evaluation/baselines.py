"""What a result is compared with: always the commonest answer, and the base model without any training.

    majority(train_labels, test_labels, task, info, evaluation)
    zero_shot(model, tokenizer, texts, test_labels, task, info, evaluation)

Each gives a Baseline with the figures that the trained model is scored by, and its predictions, for ``comparison``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftkit.evaluation import decisions, zero_shot_scores
from peftkit.evaluation.decisions import MULTI, REGRESSION, SINGLE
from peftkit.evaluation.paired_tests import mcnemar, paired, verdict, verdict_on_loss
from peftkit.evaluation.resampling import of_loss
from peftkit.schema.recipe import EvaluationConfig
from peftkit.schema.types import TaskInfo

Kept = Callable[[Sequence[str], Callable[[], np.ndarray]], np.ndarray]
DECODER_ROWS = 200
"""Rows that a decoder's zero-shot baseline scores at most: every class costs a pass over the text."""


@dataclass(frozen=True)
class Baseline:
    """Figures of a trivial or untrained predictor; both empty where it does not apply, and ``note`` says why."""

    name: str
    metrics: dict[str, float] = field(default_factory=dict)
    predicted: np.ndarray | None = None
    """Predictions of ``rows``, as class ids, 0/1 labels or numbers."""
    rows: np.ndarray | None = None
    """Numbers of the rows that were scored; None for all."""
    note: str = ""
    losses: tuple[np.ndarray, np.ndarray] | None = None
    """Of a language model: each example's summed loss, and its scored tokens."""


def majority(
    train_labels: Sequence[Any], labels: Sequence[Any], task: Any, info: TaskInfo, evaluation: EvaluationConfig
) -> Baseline:
    """Gives every row the shares of the training labels: the commonest class, each label's share, or the mean.

    Args:
        train_labels, labels: canonical labels of the training split and of the split that is scored.
        task: the Classification, for its loss and its threshold.
    """
    known, labels = np.asarray(list(train_labels), dtype=np.float64), list(labels)
    if info.problem_type == REGRESSION:
        logits, said = np.array([known.mean()]), f"always {known.mean():.4g}, the mean of training"
    elif info.problem_type == MULTI:
        share = np.clip(known.mean(axis=0), 1e-6, 1 - 1e-6)
        logits, said = np.log(share / (1 - share)), "each label's share in training"
    else:
        counts = np.bincount(known.astype(int), minlength=len(info.labels))
        logits = np.log(np.maximum(counts, 1e-6) / counts.sum())
        said = f"always '{info.labels[int(counts.argmax())]}', the commonest class of training"
    outputs = _outputs(np.tile(logits, (len(labels), 1)), labels, task, info)
    scored = task.metrics(outputs, info, evaluation)
    predicted = decisions.decide(outputs["logits"], info, task.threshold).predicted
    return Baseline("majority", scored, predicted, note=said)


def zero_shot(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[Any],
    task: Any,
    info: TaskInfo,
    evaluation: EvaluationConfig,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    decoder: bool | None = None,
    kept: Kept | None = None,
) -> Baseline:
    """The untrained base, told nothing but the names of the classes.

    An encoder's texts go to the class whose description lies nearest (cosine of mean-pooled tokens); a decoder's to
    the class whose name it finds likeliest after a prompt. Neither score is a probability, so that loss and
    calibration error are left out.

    Args:
        model: ``AutoModel`` of an encoder, or ``AutoModelForCausalLM``; which of the two is seen from its class. With
            ``decoder`` it may be a function that gives it.
        seed: chooses the rows where a decoder scores DECODER_ROWS of more.
        decoder: whether the model writes text; None looks.
        kept: gives the scores of these texts, calling the function that it is given only where it has none yet.
    """
    note = _inapplicable(info)
    if note:
        return Baseline("zero_shot", note=note)
    texts, labels = list(texts), list(labels)
    rows = np.arange(len(texts))
    decoder = zero_shot_scores.is_decoder(model) if decoder is None else decoder
    if decoder and len(rows) > DECODER_ROWS:
        rows = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(rows, DECODER_ROWS, replace=False))
        note = f"on {DECODER_ROWS} of {len(texts):,} rows"
    score = zero_shot_scores.of_decoder if decoder else zero_shot_scores.of_encoder
    chosen = [texts[row] for row in rows]

    def compute() -> np.ndarray:
        asked = model if hasattr(model, "config") else model()
        return score(asked, tokenizer, chosen, info.labels, max_length=max_length, batch_size=batch_size)

    scores = kept(chosen, compute) if kept else compute()
    outputs = {"logits": scores, "labels": np.asarray([labels[row] for row in rows])}
    wanted = [*(evaluation.metrics or decisions.DEFAULTS[SINGLE]), "accuracy"]
    named = [name for name in wanted if name not in ("loss", "calibration_error")]
    return Baseline("zero_shot", decisions.compute_metrics(outputs, info, named), scores.argmax(axis=1), rows, note)


def compare_predictions(
    baseline: Baseline, predicted: np.ndarray, gold: np.ndarray, info: TaskInfo, confidence: float = 0.95
) -> dict[str, Any]:
    """A baseline as JSON, compared with the trained model's predictions of the same rows.

    Args:
        predicted, gold: of all rows of the split, in the form of ``figures.decide`` and ``figures.references``.

    Returns:
        ``name``, ``metrics``, ``note``, ``rows`` (scored), ``comparison`` (McNemar's; None of a regression or where
        the baseline does not apply) and ``verdict``, a sentence or the empty string.
    """
    made: dict[str, Any] = {"name": baseline.name, "metrics": baseline.metrics, "note": baseline.note, "rows": None}
    made |= {"comparison": None, "verdict": ""}
    if baseline.predicted is None:
        return made
    rows = np.arange(len(gold)) if baseline.rows is None else baseline.rows
    made["rows"] = len(rows)
    if info.problem_type != REGRESSION:
        trained, other = _right(predicted[rows], gold[rows]), _right(baseline.predicted, gold[rows])
        made["comparison"] = mcnemar(trained, other, confidence)
        made["verdict"] = verdict(made["comparison"], baseline.name)
    return made


def compare_losses(
    baseline: Baseline, loss: np.ndarray, weight: np.ndarray, confidence: float = 0.95
) -> dict[str, Any]:
    """A language model's baseline as JSON, in the form of ``beside``.

    Args:
        loss, weight: the trained model's summed loss and scored tokens of each example.
    """
    made: dict[str, Any] = {"name": baseline.name, "metrics": baseline.metrics, "note": baseline.note}
    made |= {"rows": len(loss), "comparison": None, "verdict": ""}
    if baseline.losses is not None:
        trained, other = of_loss(loss, weight), of_loss(*baseline.losses)
        made["comparison"] = paired(
            [lambda rows: trained(rows)["loss"]], [lambda rows: other(rows)["loss"]], len(loss), confidence=confidence
        )
        made["verdict"] = verdict_on_loss(made["comparison"], baseline.name)
    return made


def _right(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    equal = predicted == gold
    return equal.all(axis=1) if equal.ndim == 2 else equal


def _inapplicable(info: TaskInfo) -> str:
    """Why there can be no zero-shot baseline, or the empty string."""
    if info.problem_type != SINGLE:
        return "skipped: it needs one label a row"
    empty = [label for label in info.labels if not any(letter.isalpha() for letter in label) or _is_number(label)]
    if empty:
        shown = ", ".join(repr(label) for label in empty[:3])
        return f"skipped: labels such as {shown} say nothing about the texts; name them in data.labels"
    return ""


def _is_number(label: str) -> bool:
    stem = label.lower().removeprefix("label").removeprefix("class").strip("_- ")
    return stem.isdecimal() or stem == ""


def _outputs(logits: np.ndarray, labels: Sequence[Any], task: Any, info: TaskInfo) -> dict[str, np.ndarray]:
    """What ``task.outputs`` would give for these logits."""
    import torch

    gold = np.asarray(labels)
    losses = task.losses(torch.from_numpy(logits), torch.from_numpy(gold), info).numpy()
    weights = np.ones(len(gold))
    if info.problem_type == SINGLE and info.class_weights is not None:
        weights = np.asarray(info.class_weights)[gold.astype(int)]
    return {"logits": logits, "labels": gold, "loss": losses, "weight": weights}
