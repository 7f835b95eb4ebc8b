"""Which rows make up a batch, and how they become tensors.

The batch plan of an epoch is a pure function of (lengths, recipe, seed, epoch): no sampler has a state, and resuming is
an offset into the plan. Rows of similar length share a batch, so that little is padded (bucketing, Khomenko et al.
2016, arXiv:1708.05604); rows and batches are shuffled again in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.schema.recipe import TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
POOL_BATCHES = 64
"""Batches whose rows are sorted by length together: more means less padding and less shuffling."""
PASS_TOKENS = {"cpu": 1024}
OTHER_PASS_TOKENS = 32768
GRAPH_TOKENS = {"cpu": 4 * PASS_TOKENS["cpu"]}
"""Maximum padded tokens of a batch whose rows are compared, of which all activations are kept."""
PASS_COST = {"cpu": 48}
OTHER_PASS_COST = 8192
"""Tokens that take about as long as it takes to start a pass."""
EVALUATION_ROWS = 32
"""Rows per batch of evaluation, prediction and embedding, unless a batch size is given."""
MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids")
TEXT_INPUTS = (*MODEL_INPUTS, "attention_mask")
"""Columns of a batch that have a row for each text; where rows are compared, others have one for each row."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on one process; ``counts`` is False for a filler that keeps the processes in step."""

    rows: np.ndarray
    counts: bool = True


def epoch_batches(lengths: np.ndarray, training: TrainingConfig, epoch: int) -> list[np.ndarray]:
    """The epoch's global batches as arrays of row numbers; every row, of ``lengths`` [rows] tokens, is in one."""
    generator = np.random.Generator(np.random.PCG64([training.seed, epoch]))
    order = generator.permutation(len(lengths))
    budget = (None, training.batch_tokens) if training.batch_tokens else (training.batch_size, None)
    if training.batching == "random":
        return split_by_budget(order, lengths, *budget)
    typical = training.batch_size
    if training.batch_tokens:
        typical = max(1, int(training.batch_tokens / max(1.0, float(lengths.mean()))))
    pool = POOL_BATCHES * typical
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        batches += split_by_budget(rows[np.argsort(lengths[rows], kind="stable")], lengths, *budget)
    return [batches[index] for index in generator.permutation(len(batches))]


def steps_per_epoch(lengths: np.ndarray, training: TrainingConfig) -> int:
    """Optimizer steps per epoch; with a token budget, those of the first epoch's plan."""
    if training.batch_tokens:
        return len(epoch_batches(lengths, training, 0))
    return math.ceil(len(lengths) / training.batch_size)


def shard_batch(
    batch: np.ndarray,
    lengths: np.ndarray,
    *,
    rank: int,
    world_size: int,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
    unpadded: bool = False,
) -> list[MicroBatch]:
    """One process's micro-batches of a global batch; every process gets the same number of them.

    Rows are dealt out in turn, ordered by length, so that the processes have similar amounts of work. A micro-batch has
    at most ``micro_batch`` rows and ``micro_tokens`` padded tokens, or a single row; ``unpadded`` ones have rows of one
    length.
    """
    order = batch[np.argsort(lengths[batch], kind="stable")]
    dealt = [order[each::world_size] for each in range(world_size)]
    shards = [split_by_budget(rows, lengths, micro_batch, micro_tokens, unpadded=unpadded) for rows in dealt]
    micro_batches = [MicroBatch(rows) for rows in shards[rank]]
    return micro_batches + [MicroBatch(order[:1], counts=False)] * (max(map(len, shards)) - len(micro_batches))


def split_by_budget(
    rows: np.ndarray, lengths: np.ndarray, most: int | None, tokens: int | None, *, unpadded: bool = False
) -> list[np.ndarray]:
    """Splits an ordered list of rows into batches of at most ``most`` rows and ``tokens`` padded tokens, or one row.

    With ``unpadded``, a batch has rows of one length.
    """
    batches, start, longest = [], 0, 0
    for end, length in enumerate(lengths[rows].tolist()):
        other, longest, many = unpadded and length != longest, max(longest, length), end + 1 - start
        if many > 1 and (other or (most and many > most) or (tokens and longest * many > tokens)):
            batches.append(rows[start:end])
            start, longest = end, length
    return [*batches, rows[start:]] if len(rows) else []


def pass_tokens(training: TrainingConfig, device: str) -> int:
    """Maximum padded tokens per forward pass on a type of device."""
    return training.micro_batch_tokens or PASS_TOKENS.get(device, OTHER_PASS_TOKENS)


def keeps_graphs(training: TrainingConfig, padded_tokens: int, device: str) -> bool:
    """Whether a batch whose rows are compared with each other keeps the activations of all of its passes.

    Otherwise they are computed twice (see ``Head.vectors``), as they are wherever the recipe limits a micro-batch.
    """
    limited = training.micro_batch is not None or training.micro_batch_tokens is not None
    return not limited and padded_tokens <= GRAPH_TOKENS.get(device, OTHER_PASS_TOKENS)


def text_passes(
    lengths: np.ndarray, training: TrainingConfig, device: str, *, most: int | None = None, unpadded: bool = False
) -> list[np.ndarray]:
    """The forward passes of a batch's texts, whichever row they belong to, as arrays of text numbers.

    They are cut so that padding and the cost of starting a pass are least together. None has more than ``most`` texts
    or ``pass_tokens`` padded tokens, or it is a single text; ``unpadded`` ones have texts of one length.
    """
    order, cost = np.argsort(lengths, kind="stable"), PASS_COST.get(device, OTHER_PASS_COST)
    widths, counts = np.unique(lengths, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)])
    least, cuts = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=int)
    for end, width in enumerate(widths, 1):
        costs = least[:end] + cost + width * (starts[end] - starts[:end])
        cuts[end] = int(costs.argmin())
        least[end] = costs[cuts[end]]
    passes: list[np.ndarray] = []
    end = len(widths)
    while end:
        texts = order[starts[cuts[end]] : starts[end]]
        passes += split_by_budget(texts, lengths, most, pass_tokens(training, device), unpadded=unpadded)
        end = cuts[end]
    return passes


def by_length(
    lengths: np.ndarray, size: int | None = None, tokens: int | None = None, *, unpadded: bool = False
) -> list[np.ndarray]:
    """Batches of at most ``size`` rows and ``tokens`` padded tokens, longest first: too large a batch fails at once.

    ``unpadded`` ones have rows of one length.
    """
    order = np.argsort(-lengths, kind="stable")
    return split_by_budget(order, lengths, size or EVALUATION_ROWS, tokens, unpadded=unpadded)


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of padding among the tokens of the padded batches."""
    total = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(lengths.sum()) / total if total else 0.0


def collate(columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Columns of examples → padded tensors.

    ``input_ids`` [rows, tokens] and other model inputs are padded to the longest row on the tokenizer's padding side;
    ``attention_mask`` is set by position, so that it is right even if the pad token occurs in a text; ``labels`` are
    [rows, tokens] with -100 on the padding, or [rows] / [rows, labels] for classifiers.
    """
    import torch

    lengths = [len(ids) for ids in columns["input_ids"]]
    width, left = max(lengths), tokenizer.padding_side == "left"

    def pad(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
        out = np.full((len(rows), width), value, dtype=np.int64)
        for index, row in enumerate(rows):
            out[index, slice(width - len(row), width) if left else slice(len(row))] = row
        return torch.from_numpy(out)

    fill = {"input_ids": int(tokenizer.pad_token_id or 0)}
    batch = {name: pad(columns[name], fill.get(name, 0)) for name in MODEL_INPUTS if name in columns}
    batch["attention_mask"] = pad([[1] * length for length in lengths])
    if "labels" in columns:
        labels = columns["labels"]
        batch["labels"] = pad(labels, IGNORE) if _is_per_token(labels, lengths) else torch.tensor(labels)
    if "weight" in columns:
        batch["weight"] = torch.tensor(columns["weight"], dtype=torch.float32)
    return batch


def cut_texts(batch: Mapping[str, torch.Tensor], texts: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's inputs of some texts of a batch, without the columns in which all of them are padded."""
    mask = batch["attention_mask"][texts]
    used = mask.any(dim=0).nonzero().flatten()
    columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None)
    return {name: batch[name][texts][:, columns] for name in TEXT_INPUTS if name in batch}


def _is_per_token(labels: Sequence[Any], lengths: Sequence[int]) -> bool:
    """Whether labels are lists of ints, one per token; lists of floats are multiple labels of a row."""
    first = labels[0]
    return isinstance(first, (list, np.ndarray)) and len(first) == lengths[0] and not isinstance(first[0], float)
