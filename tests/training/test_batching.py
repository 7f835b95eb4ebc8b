"""The batch plan: every row once, like lengths together, the same for the same seed, equal shares for processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.batching import (
    by_length,
    collate,
    epoch_batches,
    padding_share,
    pass_tokens,
    shard_batch,
    steps_per_epoch,
)
from peftkit.schema.recipe import TrainingConfig

LENGTHS = np.random.default_rng(0).integers(4, 129, size=3000).astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=400),
    st.integers(1, 40),
    st.sampled_from(["length", "random"]),
    st.one_of(st.none(), st.integers(1, 2000)),
    st.integers(0, 5),
)
def test_every_row_stands_in_exactly_one_batch(lengths, size, batching, budget, epoch):
    lengths = np.array(lengths, dtype=np.int32)
    training = TrainingConfig(batch_size=size, batching=batching, batch_tokens=budget)
    batches = epoch_batches(lengths, training, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        if budget:
            assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        else:
            assert len(batch) <= size


def test_length_batches_pad_less_than_five_percent_and_random_ones_much_more():
    by_size = epoch_batches(LENGTHS, TrainingConfig(batch_size=16), 0)
    at_random = epoch_batches(LENGTHS, TrainingConfig(batch_size=16, batching="random"), 0)
    assert padding_share(LENGTHS, by_size) < 0.05
    assert padding_share(LENGTHS, at_random) > 0.3


def test_the_plan_depends_on_seed_and_epoch_and_on_nothing_else():
    training = TrainingConfig(batch_size=16, seed=3)
    once, again = epoch_batches(LENGTHS, training, 1), epoch_batches(LENGTHS, training, 1)
    assert all((a == b).all() for a, b in zip(once, again, strict=True))
    for other in (
        epoch_batches(LENGTHS, training, 2),
        epoch_batches(LENGTHS, TrainingConfig(batch_size=16, seed=4), 1),
    ):
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(once, other, strict=False))


def test_batches_do_not_come_in_the_order_of_their_lengths():
    means = [LENGTHS[batch].mean() for batch in epoch_batches(LENGTHS, TrainingConfig(batch_size=16), 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_processes_share_a_batch_without_loss_in_equally_many_micro_batches(world_size, micro, rows):
    batch = np.arange(100, 100 + rows)
    lengths = np.random.default_rng(1).integers(1, 50, size=200)
    shares = [shard_batch(batch, lengths, rank=r, world_size=world_size, micro_batch=micro) for r in range(world_size)]
    assert len({len(pieces) for pieces in shares}) == 1
    counted = [row for pieces in shares for piece in pieces if piece.counts for row in piece.rows]
    assert sorted(counted) == batch.tolist()
    assert all(len(piece.rows) <= (micro or rows) for pieces in shares for piece in pieces)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("tokens", [1, 60, 200, 10_000])
def test_passes_stay_within_their_tokens(world_size, tokens):
    batch, lengths = np.arange(30), np.random.default_rng(2).integers(1, 50, size=30)
    shares = [
        shard_batch(batch, lengths, rank=r, world_size=world_size, micro_tokens=tokens) for r in range(world_size)
    ]
    assert len({len(pieces) for pieces in shares}) == 1
    pieces = [piece.rows for mine in shares for piece in mine if piece.counts]
    assert sorted(np.concatenate(pieces)) == batch.tolist()
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= tokens for rows in pieces)
    if tokens in (1, 10_000):
        assert max(map(len, pieces)) == (1 if tokens == 1 else 30 // world_size)
    passes = by_length(lengths, 32, tokens)
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= tokens for rows in passes)
    assert pass_tokens(TrainingConfig(micro_batch_tokens=tokens), "cpu") == tokens
    assert pass_tokens(TrainingConfig(), "cpu") < pass_tokens(TrainingConfig(), "cuda")


def test_steps_per_epoch_is_the_length_of_the_plan():
    for training in (TrainingConfig(batch_size=7), TrainingConfig(batch_tokens=900)):
        assert steps_per_epoch(LENGTHS, training) == len(epoch_batches(LENGTHS, training, 0))


def test_evaluation_batches_start_with_the_longest():
    batches = by_length(LENGTHS, 32)
    assert LENGTHS[batches[0]].min() >= LENGTHS[batches[-1]].max()
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_the_tokenizers_side_and_marks_tokens_by_position(side):
    tokenizer = SimpleNamespace(pad_token_id=9, padding_side=side)
    batch = collate({"input_ids": [[9, 1, 2], [3]], "labels": [[-100, 1, 2], [3]], "weight": [2.0, 1.0]}, tokenizer)
    left = side == "left"
    assert batch["input_ids"].tolist() == [[9, 1, 2], [9, 9, 3] if left else [3, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1] if left else [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 2], [-100, -100, 3] if left else [3, -100, -100]]


def test_collate_keeps_class_ids_and_label_vectors_as_they_are():
    tokenizer = SimpleNamespace(pad_token_id=0, padding_side="right")
    assert collate({"input_ids": [[1], [2]], "labels": [3, 0]}, tokenizer)["labels"].tolist() == [3, 0]
    several = collate({"input_ids": [[1, 2], [2]], "labels": [[1.0, 0.0], [0.0, 1.0]]}, tokenizer)["labels"]
    assert several.tolist() == [[1.0, 0.0], [0.0, 1.0]]
