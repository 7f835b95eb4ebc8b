"""The few batches of training rows that a method may look at before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from peftkit.data.pipeline import EncodedSplit
from peftkit.distributed.session import Session

ROWS, COUNT = 32, 8


class FirstBatches(Sequence[dict[str, torch.Tensor]]):
    """Up to 8 batches of 32 rows spread over the training split, the same on every process.

    A batch is formed when it is asked for, so that a method that asks for none costs nothing.
    """

    def __init__(self, split: EncodedSplit, tokenizer: Any, session: Session) -> None:
        self.split, self.tokenizer, self.session = split, tokenizer, session
        rows = len(split.lengths)
        chosen = np.linspace(0, rows - 1, min(rows, ROWS * COUNT)).round().astype(int)
        self._rows = np.array_split(chosen, -(-len(chosen) // ROWS))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        batch = self.split.batch(self._rows[number], self.tokenizer)
        return {name: tensor.to(self.session.device) for name, tensor in batch.items()}
