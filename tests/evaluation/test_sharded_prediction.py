"""An evaluation dealt out to several processes: each makes as many passes, and every row comes back once, in place."""

from __future__ import annotations

import accelerate.utils
import numpy as np
import pytest
import torch
from datasets import Dataset

from peftkit.data.pipeline import EncodedSplit
from peftkit.evaluation.runner import Stopped, predict


class Tokenizer:
    pad_token_id, padding_side = 0, "right"


def split(rows):
    ids = [[index + 1] * (1 + index % 5) for index in range(rows)]
    lengths = np.array([len(one) for one in ids], dtype=np.int32)
    return EncodedSplit(Dataset.from_dict({"input_ids": ids}), lengths, np.ones(rows, dtype=np.float32))


def forward(passes):
    def run(batch, outputs):
        passes.append(len(batch["input_ids"]))
        return {"first": batch["input_ids"][:, 0].float()}

    return run


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 31])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_row_once_however_they_divide(monkeypatch, rows, world_size):
    held, counts = [], []

    def gather(pieces):
        held.extend(pieces)
        return list(held)

    monkeypatch.setattr(accelerate.utils, "gather_object", gather)
    found = None
    for rank in range(world_size):
        passes, asked = [], []
        try:
            found = predict(
                forward(passes), split(rows), Tokenizer(), device=torch.device("cpu"), batch_size=3, rank=rank,
                world_size=world_size, should_stop=lambda asked=asked: asked.append(1) or False,
            )  # fmt: skip
        except AssertionError:
            assert rank < world_size - 1, "the ranks before the last have not heard of all rows yet"
        counts.append((len(passes), len(asked)))
    assert found["first"].tolist() == list(range(1, rows + 1))
    assert len(set(counts)) == 1, "all pass, and ask whether to stop, equally often"


def test_a_stop_is_asked_for_before_every_pass():
    passes = []
    with pytest.raises(Stopped):
        predict(
            forward(passes), split(9), Tokenizer(), device=torch.device("cpu"), batch_size=3,
            should_stop=lambda: len(passes) == 2,
        )  # fmt: skip
    assert len(passes) == 2
