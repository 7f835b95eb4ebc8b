"""Chooses the automatic fields of a method, such as ``layers: auto``, before the model that is trained is built.

Half of a sample of the training rows fits the head, where it is new, on the features of the frozen backbone: through a
random head no gradient means anything (Kumar et al. 2022, arXiv:2202.10054). The other half is read in small groups,
forward and backward in evaluation mode, through the head's own loss. What follows from these gradients is up to the
field (``Automatic.choose``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import pass_tokens, split_by_budget
from peftkit.data.pipeline import EncodedSplit, PreparedData, encode_rows
from peftkit.distributed.session import Session
from peftkit.models.loading import build
from peftkit.runs import choices as stored_choices
from peftkit.schema.automatic import Automatic, Choice
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.recipe import replace as with_fields
from peftkit.schema.types import LoadedModel, in_head
from peftkit.system.memory import trim_heap
from peftkit.training.frozen_trunk import FEATURES, find_frozen_trunk
from peftkit.training.log import progress_bar
from peftkit.training.step import TaskModule

GROUPS, FEWEST_ROWS = 64, 32
"""Groups of rows that give a gradient each, and rows that are read however long they are."""
COMPARED_ROWS = 4
"""Rows of a group where the loss compares rows."""
TOKENS = 2**14
"""Tokens after which no more rows are read for gradients, so that long rows take minutes at most."""
HEAD_EPOCHS, HEAD_ROWS, HEAD_RATE = 30, 32, 1e-2
"""How a new head is fitted: passes over the cached features, rows per step, and AdamW's learning rate at the start."""
UNCACHED_EPOCHS = 3
"""The same where the backbone's features cannot be cached."""


def choose(
    recipe: Recipe, session: Session, prepared: PreparedData, tokenizer: Any
) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with a value in place of each automatic field, and why; one process chooses for all."""
    choices: list[Choice] = []
    for field, asked in recipe.method.automatic().items():
        work = functools.partial(_choose, field, asked, recipe, session, prepared, tokenizer)
        choices.append(session.run_on_main(work))
        recipe = stored_choices.settled(recipe, choices[-1])
    return recipe, tuple(choices)


def _choose(
    field: str, asked: Automatic, recipe: Recipe, session: Session, prepared: PreparedData, tokenizer: Any
) -> Choice:
    started = time.perf_counter()
    # one document per row: whether the model separates packed ones is not known yet
    plain = with_fields(recipe, task=recipe.task.without_packing(), training={"compile": False})
    plain = plain.model_copy(update={"method": recipe.method.probed()})
    loaded = build(plain, prepared.info, tokenizer, session.device)
    module = TaskModule(loaded, head_of(prepared.info, plain.task)).eval()
    rows = _sample(prepared, asked.rows)
    read = functools.partial(_encoded, prepared, tokenizer, plain)
    if loaded.head_names:
        half = len(rows) // 2
        fit_head(module, loaded, read(rows[half:]), tokenizer, session)
        rows = rows[:half] if half else rows
    gradients = GroupGradients(module, loaded, plain, _within_tokens(read(rows)), tokenizer, session)
    choice = asked.choose(field, loaded, gradients)
    module.zero_grad(set_to_none=True)
    del loaded, module
    trim_heap()
    return replace(choice, rows=len(gradients.split.lengths), seconds=time.perf_counter() - started)


def _sample(prepared: PreparedData, most: int) -> np.ndarray:
    """Numbers of training rows spread over the split, in an order of their own: sources may be sorted."""
    count = len(prepared.splits["train"])
    spread = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return np.random.default_rng(0).permutation(spread)


def _encoded(prepared: PreparedData, tokenizer: Any, recipe: Recipe, rows: np.ndarray) -> EncodedSplit:
    """Training rows as the first epoch reads them."""
    chosen = prepared.splits["train"].select(rows)
    return encode_rows(list(chosen), tokenizer, recipe, prepared.info).for_epoch(recipe.training.seed, 0)


def _within_tokens(split: EncodedSplit) -> EncodedSplit:
    """The first examples of a split, as many as ``TOKENS`` allows."""
    count = int(np.searchsorted(np.cumsum(split.lengths), TOKENS, side="right"))
    return split.select(np.arange(min(len(split.lengths), max(count, FEWEST_ROWS))))


def fit_head(module: TaskModule, loaded: LoadedModel, split: EncodedSplit, tokenizer: Any, session: Session) -> None:
    """Trains the new layers on top of a frozen backbone, whose features are computed once where it can be cut off."""
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    head = [parameter for name, parameter in trained.items() if in_head(name, loaded.head_names)]
    for name, parameter in trained.items():
        parameter.requires_grad_(in_head(name, loaded.head_names))
    batches = _head_batches(module, split, tokenizer, session)
    epochs = HEAD_EPOCHS if module.trunk is not None else UNCACHED_EPOCHS
    optimizer = torch.optim.AdamW(head, lr=HEAD_RATE)
    total, generator = epochs * len(batches), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for _ in range(epochs):
        for number in generator.permutation(len(batches)):
            batch, weight = batches[number]
            optimizer.zero_grad()
            with session.accelerator.autocast():
                loss = module(_completed(module, batch)) / weight
            loss.backward()
            optimizer.step()
            schedule.step()
    module.trunk = None
    for parameter in trained.values():
        parameter.requires_grad_(True)
        parameter.grad = None


def _head_batches(
    module: TaskModule, split: EncodedSplit, tokenizer: Any, session: Session
) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Batches and their weights; with the backbone's features in place of tokens where the module gets a trunk."""
    order = np.argsort(split.lengths, kind="stable")
    parts = split_by_budget(order, split.lengths, HEAD_ROWS, None, unpadded=module.unpadded)
    batches = [(session.on_device(split.batch(rows, tokenizer)), split.weight(rows, tokenizer)) for rows in parts]
    batches = [(batch, weight) for batch, weight in batches if weight]
    if type(module.head).collate is not Head.collate:
        return batches  # a row may be several sequences
    with torch.no_grad(), session.accelerator.autocast():
        forward = functools.partial(module, outputs=True)
        trunk, _ = find_frozen_trunk(module.model, forward, batches[len(batches) // 2][0], module.pooling)
        if trunk is None:
            return batches
        features = [
            {**trunk.reduced(batch), FEATURES: trunk.capture(functools.partial(forward, batch), batch)}
            for batch, _ in batches
        ]
    module.trunk = trunk
    return [(batch, weight) for batch, (_, weight) in zip(features, batches)]


@dataclass
class GroupGradients:
    """Iterated, leaves the gradient of the mean loss of one group of rows after the other on the model."""

    module: TaskModule
    loaded: LoadedModel
    recipe: Recipe
    split: EncodedSplit
    tokenizer: Any
    session: Session

    def __iter__(self) -> Iterator[None]:
        groups = self.groups()
        with progress_bar("gradients of rows", len(groups), shown=self.session.is_main) as advance:
            for rows in groups:
                self.module.zero_grad(set_to_none=True)
                if weight := self.split.weight(rows, self.tokenizer):
                    for part in self._passes(rows):
                        self._backward(part, weight)
                    yield
                advance(1)
        self.module.zero_grad(set_to_none=True)

    def groups(self) -> list[np.ndarray]:
        """Numbers of the split's examples, group by group."""
        count = len(self.split.lengths)
        each = COMPARED_ROWS if self.module.head.compares_rows else 1
        return np.array_split(np.arange(count), max(1, min(GROUPS, count // each)))

    def _passes(self, rows: np.ndarray) -> list[np.ndarray]:
        """A group in forward passes of bounded size, unless its loss needs all of its rows at once."""
        head = self.module.head
        if head.compares_rows or head.sums_batches:
            return [rows]
        tokens = pass_tokens(self.recipe.training, self.session.device.type)
        return split_by_budget(rows, self.split.lengths, None, tokens, unpadded=self.module.unpadded)

    def _backward(self, rows: np.ndarray, weight: float) -> None:
        batch = self.session.on_device(self.split.batch(rows, self.tokenizer))
        with self.session.accelerator.autocast():
            if self.module.head.reference_splits():
                batch |= self._reference(batch)
            loss = self.module(_completed(self.module, batch)) / weight
        loss.backward()

    @torch.no_grad()
    def _reference(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the untrained model makes of the rows."""
        off = nullcontext() if self.recipe.starts_as_compared else self.loaded.model.disable_adapter()
        with off:
            outputs: dict[str, torch.Tensor] = self.module(batch, use="reference_outputs")
        return outputs


def _completed(module: TaskModule, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the head's sums over it, where its loss needs them."""
    if not module.head.sums_batches:
        return batch
    with torch.no_grad():
        return batch | {"batch_sums": module(batch, use="batch_sums")}
