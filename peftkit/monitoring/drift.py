"""Whether served texts are like those that a model was validated on.

Numbers are compared by the Kolmogorov-Smirnov test, labels by the chi-squared test, embeddings by the maximum mean
discrepancy (Gretton et al. 2012, "A kernel two-sample test") with permuted rows. All p-values of a comparison are
corrected together (Holm 1979), and a difference counts only where it is not small as well: with enough rows every
difference is significant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

ROWS = 30
"""Fewer rows than this are not tested."""
SAMPLE = 400
"""Most embeddings of each side: the kernel between all pairs is in memory."""
PERMUTATIONS = 999
EXPECTED = 5
"""Labels that are expected less often than this are counted together."""


@dataclass(frozen=True)
class Measurements:
    """What is known of some texts and of their answers."""

    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, a number for each text that has one."""
    labels: Sequence[str] = ()
    embeddings: np.ndarray | None = None
    """[texts, width]."""


@dataclass(frozen=True)
class Difference:
    """One measure, compared."""

    measure: str
    test: str
    rows: int
    """Served texts that have it."""
    reference: float | None
    """Mean of the validation rows; None of labels and embeddings."""
    served: float | None
    effect: float | None
    """From 0, alike, to 1: the largest distance of the distribution functions; the share of labels that would have to
    change; the maximum mean discrepancy. None where it was not tested."""
    p_value: float | None
    """Corrected for the number of tests, once ``corrected`` was called."""
    note: str = ""
    """Why it was not tested, or what differs most."""

    def drifted(self, level: float, effect: float) -> bool:
        """Whether it differs, significantly and by more than a little."""
        tested = self.p_value is not None and self.effect is not None
        return bool(tested and self.p_value < level and self.effect >= effect)  # type: ignore[operator]


def compare(reference: Measurements, served: Measurements, *, seed: int = 0) -> list[Difference]:
    """Every measure that either side has, each tested where both have enough of it."""
    names = [*reference.numbers, *(name for name in served.numbers if name not in reference.numbers)]
    empty = np.zeros(0)
    differences = [
        _numbers(name, reference.numbers.get(name, empty), served.numbers.get(name, empty)) for name in names
    ]
    if reference.labels or served.labels:
        differences.append(_labels(reference.labels, served.labels))
    if reference.embeddings is not None or served.embeddings is not None:
        differences.append(_embeddings(reference.embeddings, served.embeddings, seed))
    return differences


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with p-values that hold for all of them together (Holm)."""
    tested = [place for place, one in enumerate(differences) if one.p_value is not None]
    order = sorted(tested, key=lambda place: differences[place].p_value or 0.0)
    result, largest = list(differences), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (differences[place].p_value or 0.0)))
        result[place] = replace(differences[place], p_value=largest)
    return result


def _too_few(measure: str, test: str, reference: int, served: int) -> Difference | None:
    if min(reference, served) >= ROWS:
        return None
    side = "validated" if reference < served else "served"
    note = f"not tested: {side} {min(reference, served)}, needed {ROWS}"
    return Difference(measure, test, served, None, None, None, None, note)


def _numbers(name: str, reference: np.ndarray, served: np.ndarray) -> Difference:
    test = "Kolmogorov-Smirnov"
    if few := _too_few(name, test, len(reference), len(served)):
        return few
    result = stats.ks_2samp(reference, served, method="asymp")
    means = float(reference.mean()), float(served.mean())
    return Difference(name, test, len(served), *means, float(result.statistic), float(result.pvalue))


def _labels(reference: Sequence[str], served: Sequence[str]) -> Difference:
    test = "chi-squared"
    if few := _too_few("labels", test, len(reference), len(served)):
        return few
    counts = [Counter(reference), Counter(served)]
    names = sorted({*reference, *served})
    table = np.array([[count[name] for name in names] for count in counts], dtype=float)
    shares = table / table.sum(axis=1, keepdims=True)
    changes = shares[1] - shares[0]
    most = int(np.abs(changes).argmax())
    note = f"'{names[most]}' {shares[0][most]:.1%} → {shares[1][most]:.1%}"
    expected = table.sum(axis=0) * table.sum(axis=1).min() / table.sum()
    rare = expected < EXPECTED
    pooled = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)]) if rare.any() else table
    pooled = pooled[:, pooled.sum(axis=0) > 0]
    p_value = float(stats.chi2_contingency(pooled).pvalue) if pooled.shape[1] > 1 else 1.0
    return Difference("labels", test, len(served), None, None, float(np.abs(changes).sum() / 2), p_value, note)


def _embeddings(reference: np.ndarray | None, served: np.ndarray | None, seed: int) -> Difference:
    test = "maximum mean discrepancy"
    sizes = [0 if side is None else len(side) for side in (reference, served)]
    if few := _too_few("embeddings", test, *sizes):
        return few
    assert reference is not None
    assert served is not None
    if reference.shape[1] != served.shape[1]:
        note = f"not tested: vectors of {served.shape[1]} dimensions, those of validation have {reference.shape[1]}"
        return Difference("embeddings", test, len(served), None, None, None, None, note)
    generator = np.random.Generator(np.random.PCG64(seed))
    effect, p_value = mmd(_sample(reference, generator), _sample(served, generator), generator)
    return Difference("embeddings", test, len(served), None, None, effect, p_value)


def _sample(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= SAMPLE else rows[generator.choice(len(rows), SAMPLE, replace=False)]


def mmd(left: np.ndarray, right: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Maximum mean discrepancy of two samples [rows, width], and its p-value by permuted rows.

    The kernel is Gaussian, as wide as the median distance; the square is the unbiased estimate, 0 where it is negative.
    """
    both = np.concatenate([left, right]).astype(np.float64)
    squares = (both**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * both @ both.T, 0.0)
    median = np.median(distances[np.triu_indices(len(both), 1)])
    kernel = np.exp(-distances / (median or 1.0))
    np.fill_diagonal(kernel, 0.0)
    first = np.zeros((PERMUTATIONS + 1, len(both)))  # whether a row belongs to the first sample
    first[0, : len(left)] = 1
    for row in first[1:]:
        row[generator.permutation(len(both))[: len(left)]] = 1
    second = 1 - first
    within = np.einsum("ij,ij->i", first @ kernel, first) / (len(left) * (len(left) - 1))
    within += np.einsum("ij,ij->i", second @ kernel, second) / (len(right) * (len(right) - 1))
    between = np.einsum("ij,ij->i", first @ kernel, second) / (len(left) * len(right))
    values = within - 2 * between
    p_value = float(np.mean(values >= values[0] - 1e-12))
    return float(np.sqrt(max(values[0], 0.0))), p_value
