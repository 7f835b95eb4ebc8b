"""Metrics of generated text, which need no network.

    score(["the cat sat"], ["a cat sat down"], ("rouge", "chrf"))                  # {"rouge1": …, "rougeL": …, …}
    load("rouge").compute(predictions=…, references=…)                             # a module of the evaluate library

ROUGE is rouge-score's, BLEU and chrF are sacreBLEU's, exact match and token F1 are SQuAD's; all values are between 0
and 1, sacreBLEU's percentages divided by 100.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import DataError
from peftkit.registry import Registry

if TYPE_CHECKING:
    import evaluate

TEXT_METRICS: Registry[type[TextMetric]] = Registry("text metric", group="peftkit.text_metrics")
DEFAULT = ("rouge", "chrf", "exact_match", "token_f1")


class TextMetric:
    """Figures over predicted and reference texts, row by row."""

    paper: ClassVar[str] = ""

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """The values over all rows."""
        raise NotImplementedError


@TEXT_METRICS.register("rouge")
class Rouge(TextMetric):
    """Overlap of words (rouge1), word pairs (rouge2) and the longest common subsequence, by text (rougeL) and by
    lines (rougeLsum): mean F1 over rows, without stemming. Words are those of the Latin alphabet and digits."""

    paper = "Lin 2004, ROUGE: a package for automatic evaluation of summaries, W04-1013"
    kinds: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.kinds))
        rows = [scorer.score(target, prediction) for prediction, target in zip(predictions, references)]
        return {kind: _mean(row[kind].fmeasure for row in rows) for kind in self.kinds}


@TEXT_METRICS.register("bleu")
class Bleu(TextMetric):
    """Corpus BLEU: geometric mean of the 1- to 4-gram precisions, times the brevity penalty (13a tokenization)."""

    paper = "Papineni et al. 2002, P02-1040; Post 2018, arXiv:1804.08771"

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        import sacrebleu

        return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100}


@TEXT_METRICS.register("chrf")
class Chrf(TextMetric):
    """Corpus chrF: F2 of character n-grams up to 6; asks nothing of a language's words."""

    paper = "Popović 2015, W15-3049; Post 2018, arXiv:1804.08771"

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        import sacrebleu

        return {"chrf": sacrebleu.corpus_chrf(list(predictions), [list(references)]).score / 100}


@TEXT_METRICS.register("exact_match")
class ExactMatch(TextMetric):
    """Share of rows whose prediction is the reference, but for case, punctuation, English articles and spaces."""

    paper = "Rajpurkar et al. 2016, arXiv:1606.05250"

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        pairs = zip(predictions, references)
        return {"exact_match": _mean(float(normalize(text) == normalize(wanted)) for text, wanted in pairs)}


@TEXT_METRICS.register("token_f1")
class TokenF1(TextMetric):
    """Mean over rows of the F1 between the words of prediction and reference, as bags, normalized as in exact match."""

    paper = "Rajpurkar et al. 2016, arXiv:1606.05250"

    def compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"token_f1": _mean(_word_f1(text, wanted) for text, wanted in zip(predictions, references))}


def load(name: str, **options: Any) -> evaluate.EvaluationModule:
    """The text metric of that name as a module of the evaluate library.

    Args:
        options: of ``evaluate.Metric``; predictions stay in memory unless ``keep_in_memory=False`` says otherwise.

    Raises:
        RecipeError: there is none of that name; the nearest is named.
    """
    metric = TEXT_METRICS.get(name)()
    from peftkit.evaluation.evaluate_modules import Module

    description = type(metric).__doc__ or ""
    return Module(metric.compute, "texts", description, metric.paper, **{"keep_in_memory": True, **options})


def score(predictions: Sequence[str], references: Sequence[str], names: Sequence[str] = DEFAULT) -> dict[str, float]:
    """The values of several metrics over the same rows; empty when there are no rows.

    Raises:
        DataError: there are more predictions than references, or fewer.
        RecipeError: there is no metric of a name.
    """
    metrics = [TEXT_METRICS.get(name)() for name in names]
    if len(predictions) != len(references):
        raise DataError(f"expected one reference per prediction, found {len(predictions)} and {len(references)}")
    values: dict[str, float] = {}
    for metric in metrics if len(predictions) else []:
        values |= metric.compute(predictions, references)
    return values


def perplexity(loss: float, tokens: float) -> float:
    """exp(loss / tokens) of a summed negative log-likelihood; infinite where that overflows, NaN without tokens."""
    if tokens <= 0:
        return math.nan
    mean = loss / tokens
    return math.exp(mean) if mean < 700 else math.inf


def normalize(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _word_f1(prediction: str, reference: str) -> float:
    written, wanted = normalize(prediction).split(), normalize(reference).split()
    if not written or not wanted:
        return float(written == wanted)
    shared = sum((Counter(written) & Counter(wanted)).values())
    return 2 * shared / (len(written) + len(wanted))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
