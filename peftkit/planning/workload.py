"""The passes that a run will make, from its own token lengths: the batch plan is a pure function, so it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.data.batching import by_length, epoch_batches, pass_tokens, shard_batch, steps_per_epoch
from peftkit.schema.head import possible_heads
from peftkit.planning.traced_model import Shape
from peftkit.schema.recipe import Recipe

EVALUATION_ROWS = 32


@dataclass(frozen=True)
class Workload:
    """Shapes of passes in training and evaluation, and how many."""

    train: tuple[Shape, ...]
    """Passes of one epoch."""
    evaluation: tuple[Shape, ...]
    """Passes of one validation."""
    steps: int
    epochs: float
    accumulates: bool
    """Whether a step has several passes."""

    @property
    def largest(self) -> Shape:
        """The training pass with the most padded tokens, the longest among equals."""
        return max(self.train, key=lambda shape: (shape.rows * shape.tokens, shape.tokens))

    @property
    def largest_evaluation(self) -> Shape:
        """The evaluation pass with the most padded tokens."""
        return max(self.evaluation, key=lambda shape: (shape.rows * shape.tokens, shape.tokens))


def of_data(recipe: Recipe, encoded: Any, device: str, *, packed: bool, world_size: int = 1) -> Workload:
    """The workload of a recipe on its encoded data; of several processes, that of the first.

    Lengths beyond ``data.max_length`` are cut to it, so that a shorter limit can be planned without tokenizing anew.
    """
    training, train = recipe.training, encoded.splits["train"]
    lengths = np.minimum(train.lengths, recipe.data.max_length)
    tokens = pass_tokens(training, device)
    rows = training.micro_batch if isinstance(training.micro_batch, int) else None
    counts_tokens = all(head.scores_tokens for head in possible_heads(recipe.task))

    def shape(index: np.ndarray, of: np.ndarray, weights: np.ndarray) -> Shape:
        width = int(of[index].max())
        scored = int(weights[index].sum()) if counts_tokens else 0
        return Shape(len(index), width, min(scored, len(index) * (width - 1)), packed)

    passes, several = [], False
    for batch in epoch_batches(lengths, training, 0):
        pieces = shard_batch(batch, lengths, rank=0, world_size=world_size, micro_batch=rows, micro_tokens=tokens)
        several = several or len(pieces) > 1
        passes += [shape(piece.rows, lengths, train.weights) for piece in pieces]
    held = encoded.splits["validation"]
    held_lengths = np.minimum(held.lengths, recipe.data.max_length)
    batches = by_length(held_lengths, recipe.evaluation.batch_size or EVALUATION_ROWS, tokens)
    per_epoch = steps_per_epoch(lengths, training)
    steps = min(math.ceil(per_epoch * training.epochs), training.max_steps or 10**12)
    evaluation = tuple(shape(batch, held_lengths, held.weights) for batch in batches)
    return Workload(tuple(passes), evaluation, steps, steps / per_epoch, several)


def of_shape(rows: int, tokens: int) -> Workload:
    """One pass of a given shape, all of it scored."""
    shape = Shape(rows, tokens, rows * (tokens - 1))
    return Workload((shape,), (shape,), 1, 1, False)
