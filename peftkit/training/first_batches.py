"""The few training batches that a method or task may look at before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from peftkit.data.pipeline import EncodedSplit
from peftkit.distributed.session import Session

ROWS, BATCHES = 32, 8


class FirstBatches(Sequence[dict[str, torch.Tensor]]):
    """Up to 8 batches of 32 rows spread over the training split, equal on all processes.

    A batch is collated on access, so that a method that needs none costs nothing.
    """

    def __init__(self, split: EncodedSplit, tokenizer: Any, session: Session) -> None:
        self.split, self.tokenizer, self.session = split, tokenizer, session
        rows = len(split.lengths)
        spread = np.linspace(0, rows - 1, min(rows, ROWS * BATCHES)).round().astype(int)
        self._rows = np.array_split(spread, -(-len(spread) // ROWS))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        batch = self.split.batch(self._rows[number], self.tokenizer)
        return {name: tensor.to(self.session.device) for name, tensor in batch.items()}
