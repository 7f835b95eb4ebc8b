"""Metrics of generated text against references, which need no network; all values are between 0 and 1.

rouge1, rouge2, rougeL, rougeLsum: overlap of words, word pairs and the longest common subsequence, by text and by
lines; mean F1 over rows, without stemming; words are those of the Latin alphabet and digits (Lin 2004, W04-1013).
chrf: corpus F2 of character n-grams up to 6, for any language (Popović 2015, W15-3049; Post 2018, arXiv:1804.08771).
bleu: corpus BLEU, tokenized as sacrebleu does (Papineni et al. 2002, P02-1040; Post 2018).
exact_match, token_f1: share of equal texts, and F1 between the words of both as bags, after ``normalize`` (SQuAD,
Rajpurkar et al. 2016, arXiv:1606.05250).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All metrics over the same rows, at least one."""
    return statistics(predictions, references)(np.arange(len(predictions)))


def statistics(predictions: Sequence[str], references: Sequence[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """All metrics of a choice of rows, for the bootstrap; the texts are read once.

    BLEU and chrF are not means over rows: what they count of each row is added up, as sacrebleu's own tests of
    significance do it.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    pairs = list(zip(predictions, references, strict=True))
    scorer = RougeScorer(list(ROUGE))
    overlaps = [scorer.score(target, prediction) for prediction, target in pairs]
    words = [(normalize(prediction).split(), normalize(target).split()) for prediction, target in pairs]
    means = {kind: np.array([row[kind].fmeasure for row in overlaps]) for kind in ROUGE}
    equal = np.array([prediction == target for prediction, target in words], dtype=float)
    bags = np.array([_bag_f1(*pair) for pair in words])
    corpus = {
        name: (metric, np.array(metric._extract_corpus_statistics(list(predictions), [list(references)])))
        for name, metric in (("chrf", CHRF()), ("bleu", BLEU()))
    }

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        return {
            **{kind: _mean(values[rows]) for kind, values in means.items()},
            **{
                name: float(metric._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score) / 100
                for name, (metric, counts) in corpus.items()
            },
            "exact_match": _mean(equal[rows]),
            "token_f1": _mean(bags[rows]),
        }

    return of_rows


def sentences(text: str) -> list[tuple[int, int]]:
    """(first character, end) of each sentence: it ends at ., ! or ? before a space, or at a line end."""
    places = []
    for match in re.finditer(r".+?(?:[.!?](?=\s)|\n|\Z)", text, re.DOTALL):
        start = match.start() + len(match[0]) - len(match[0].lstrip())
        end = match.start() + len(match[0].rstrip())
        if end > start:
            places.append((start, end))
    return places


def normalize(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _bag_f1(prediction: list[str], target: list[str]) -> float:
    if not prediction or not target:
        return float(prediction == target)
    return 2 * (Counter(prediction) & Counter(target)).total() / (len(prediction) + len(target))


def _mean(values: np.ndarray) -> float:
    """Added up in order, so that a metric is the same to the last bit whatever numpy's sums do."""
    return float(sum(values.tolist())) / len(values)
