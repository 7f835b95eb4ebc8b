"""The table of the data says what is really padded: that of the passes, not of the batches they are cut from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from peftkit.reporting.run_report import split_rows
from peftkit.schema.recipe import Recipe


def padding(**training) -> float:
    lengths = np.random.default_rng(0).integers(10, 500, size=256).astype(np.int32)
    split = SimpleNamespace(lengths=lengths, examples=SimpleNamespace(column_names=[]))
    recipe = Recipe.parse({"name": "r", "model": {"source": "m"}, "data": {"source": "d"}, "training": training})
    (row,) = split_rows(SimpleNamespace(splits={"train": split}), recipe, "cpu")
    assert (row["examples"], row["tokens"], row["longest"]) == (256, int(lengths.sum()), int(lengths.max()))
    assert row["padding"].endswith(" in 16 batches")
    return float(row["padding"].partition("%")[0])


def test_padding_is_that_of_the_passes():
    assert padding(batching="length") < 5
    assert padding(batching="random", micro_batch_tokens=10**6) > 30
    assert padding(batching="random") < padding(batching="random", micro_batch=8, micro_batch_tokens=10**6) < 30
    assert padding(batching="random", micro_batch=1) == 0
