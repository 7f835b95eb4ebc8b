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
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All metrics over the same rows, at least one."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    pairs = list(zip(predictions, references, strict=True))
    scorer = RougeScorer(list(ROUGE))
    overlaps = [scorer.score(target, prediction) for prediction, target in pairs]
    words = [(normalize(prediction).split(), normalize(target).split()) for prediction, target in pairs]
    return {
        **{kind: _mean([row[kind].fmeasure for row in overlaps]) for kind in ROUGE},
        "chrf": sacrebleu.corpus_chrf(list(predictions), [list(references)]).score / 100,
        "bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100,
        "exact_match": _mean([prediction == target for prediction, target in words]),
        "token_f1": _mean([_bag_f1(*pair) for pair in words]),
    }


def normalize(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _bag_f1(prediction: list[str], target: list[str]) -> float:
    if not prediction or not target:
        return float(prediction == target)
    return 2 * (Counter(prediction) & Counter(target)).total() / (len(prediction) + len(target))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
