"""Texts of a compared batch are cut into passes: each text once, limits kept, no cut beats the one that is chosen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from peftkit.data import batching
from peftkit.data.batching import text_passes
from peftkit.schema.recipe import TrainingConfig


def cost(lengths, passes):
    return sum(batching.PASS_COST["cpu"] + len(texts) * int(lengths[texts].max()) for texts in passes)


def every_cut(lengths):
    ordered = np.argsort(lengths, kind="stable")
    for size in range(len(ordered)):
        for places in itertools.combinations(range(1, len(ordered)), size):
            yield np.split(ordered, places)


@pytest.mark.parametrize("seed", range(8))
def test_no_cut_costs_less(seed):
    lengths = np.random.default_rng(seed).integers(1, 120, size=9)
    passes = text_passes(lengths, TrainingConfig(), "cpu")
    assert sorted(np.concatenate(passes).tolist()) == list(range(9))
    assert cost(lengths, passes) == min(cost(lengths, cut) for cut in every_cut(lengths))


def test_limits_are_kept():
    lengths = np.random.default_rng(0).integers(1, 50, size=200)
    training = TrainingConfig(micro_batch_tokens=300)
    for texts in text_passes(lengths, training, "cpu", most=16):
        assert len(texts) <= 16
        assert len(texts) * lengths[texts].max() <= 300
    for texts in text_passes(lengths, training, "cpu", unpadded=True):
        assert len(set(lengths[texts])) == 1
