"""The micro-batches of a run, known beforehand from its token lengths: the batch plan is a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.data.batching import (
    by_length,
    epoch_batches,
    keeps_graphs,
    pass_tokens,
    shard_batch,
    steps_per_epoch,
    text_passes,
)
from peftkit.planning.traced_model import Shape
from peftkit.schema.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """The shapes of all micro-batches."""

    train: tuple[Shape, ...]
    """Of one epoch."""
    evaluation: tuple[Shape, ...]
    """Of one validation."""
    steps: int
    epochs: float
    accumulates: bool
    """Whether a step has several micro-batches."""

    @property
    def largest(self) -> Shape:
        """The largest shape of training."""
        return max(self.train, key=Shape.size)

    @property
    def largest_evaluation(self) -> Shape:
        """The largest shape of evaluation."""
        return max(self.evaluation, key=Shape.size)


def data_workload(
    recipe: Recipe,
    encoded: Any,
    device: str,
    *,
    world_size: int = 1,
    unpadded: bool = False,
    compares_rows: bool = False,
) -> Workload:
    """The workload of a recipe on its encoded data; of several processes, the first one's.

    Args:
        unpadded: whether micro-batches have rows of one length.
        compares_rows: whether the loss compares the rows of a batch, whose texts one process embeds by like length.
    """
    training, train = recipe.training, encoded.splits["train"]
    longest = recipe.data.max_length * recipe.task.texts_per_row(recipe.data)
    lengths = np.minimum(train.lengths, longest)  # a smaller limit may be planned than was encoded with
    tokens, packed = pass_tokens(training, device), "position_ids" in train.examples.column_names
    rows = training.micro_batch if isinstance(training.micro_batch, int) else None

    def shape(index: np.ndarray, of: np.ndarray, tokens_scored: np.ndarray | None) -> Shape:
        width = int(of[index].max())
        scored = 0 if tokens_scored is None else int(tokens_scored[index].sum())
        return Shape(len(index), width, min(scored, len(index) * (width - 1)), packed)

    train_scored, shapes, accumulates = train.scored, [], False
    parts = np.array(train.examples["parts"]) if compares_rows else np.empty(0)
    for batch in epoch_batches(lengths, training, 0):
        if compares_rows and world_size == 1:
            passes = _passes(np.minimum(parts[batch], recipe.data.max_length), recipe, device, unpadded)
            shapes += passes
            accumulates = accumulates or len(passes) > 1
            continue
        shard = shard_batch(
            batch, lengths, rank=0, world_size=world_size, micro_batch=rows, micro_tokens=tokens, unpadded=unpadded
        )
        accumulates = accumulates or len(shard) > 1
        shapes += [shape(micro_batch.rows, lengths, train_scored) for micro_batch in shard]
    validation = encoded.splits["validation"]
    validation_lengths, validation_scored = np.minimum(validation.lengths, longest), validation.scored
    batches = by_length(validation_lengths, recipe.evaluation.batch_size, tokens, unpadded=unpadded)
    per_epoch = steps_per_epoch(lengths, training)
    steps = min(math.ceil(per_epoch * training.epochs), training.max_steps or 10**12)
    evaluation = tuple(shape(batch, validation_lengths, validation_scored) for batch in batches)
    return Workload(tuple(shapes), evaluation, steps, steps / per_epoch, accumulates)


def _passes(texts: np.ndarray, recipe: Recipe, device: str, unpadded: bool) -> list[Shape]:
    """The shapes of a batch of rows that are compared, [rows, texts] tokens: a single one where its graphs are kept."""
    training, each, lengths = recipe.training, texts.shape[1], texts.flatten()
    most = training.micro_batch * each if isinstance(training.micro_batch, int) else None
    passes = text_passes(lengths, training, device, most=most, unpadded=unpadded)
    shapes = [Shape(-(-len(texts) // each), int(lengths[texts].max()) * each, 0) for texts in passes]
    padded = sum(shape.padded_tokens for shape in shapes)
    if keeps_graphs(training, padded, device):
        return [Shape(len(texts), -(-padded // len(texts)), 0)]
    return shapes
