"""One optimizer step, and the module that every forward pass goes through."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import MicroBatch, pass_tokens, shard_batch
from peftkit.data.pipeline import EncodedSplit
from peftkit.distributed.session import Session
from peftkit.distributed.sharding import unshard
from peftkit.schema.head import Head
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel
from peftkit.training.auto_micro_batch import AUTO, retry_on_oom
from peftkit.training.frozen_trunk import FEATURES, FrozenTrunk
from peftkit.training.randomness import seed_micro_batch


class TaskModule(torch.nn.Module):
    """The model under its head: ``forward`` gives the summed loss, or the outputs that evaluation needs.

    Being one module, it is what Accelerate wraps for many processes.
    """

    def __init__(self, loaded: LoadedModel, head: Head) -> None:
        super().__init__()
        self.model = loaded.model
        self.head, self.pooling = head, loaded.pooling
        # the blocks that FSDP shards one by one
        self._no_split_modules = list(getattr(loaded.model, "_no_split_modules", None) or [])
        self.stem: FrozenTrunk | None = None
        """The part of the model that nothing changes; it stays in evaluation mode."""
        self._mode: bool | None = None
        """What ``train`` set last."""

    def forward(self, batch: dict[str, torch.Tensor], *, outputs: bool = False) -> Any:
        """Summed loss (a scalar), or a dict of tensors with one row an example.

        A batch with ``features`` (see ``training.features``) enters the model above its stem.
        """
        use = self.head.outputs if outputs else self.head.loss
        features = batch.get(FEATURES)
        if features is None or self.stem is None:
            return use(self.model, batch, self.pooling)
        with self.stem.replay(features):
            rest = {name: tensor for name, tensor in batch.items() if name != FEATURES}
            return use(self.model, rest, self.pooling)

    def hold(self, stem: FrozenTrunk) -> None:
        """Keeps a stem in evaluation mode from now on."""
        self.stem, self._mode = stem, None

    def train(self, mode: bool = True) -> TaskModule:
        """Training mode for all but the stem, in which dropout would change what is known to be fixed."""
        if self._mode == mode == self.training == self.model.training:
            return self  # walking through every module at every step costs more than a step on features
        super().train(mode)
        self._mode = mode
        for module in self.stem.still if self.stem else ():
            module.eval()
        return self


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; sums are over the global batch."""

    loss: float
    """Mean loss over the scored examples or tokens."""
    weight: float
    grad_norm: float
    rows: int
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


@dataclass
class Stepper:
    """Carries out optimizer steps: forward and backward of every micro-batch, one division, clipping, one update."""

    recipe: Recipe
    session: Session
    module: torch.nn.Module
    """The TaskModule, wrapped by Accelerate."""
    optimizer: Any
    scheduler: Any
    split: EncodedSplit
    tokenizer: Any

    def __post_init__(self) -> None:
        self._parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        given = self.recipe.training.micro_batch
        self.micro_batch: int | None = given if isinstance(given, int) else None
        """Rows a pass at most; automatic ones shrink when memory runs out."""
        self.tell: Callable[[str], None] = lambda _: None
        """Told when they do."""

    @functools.cached_property
    def model(self) -> Any:
        """The model itself, as the method made it; unwrapped once, for Accelerate looks through all of it each time."""
        return self.session.accelerator.unwrap_model(self.module).model

    def run(self, batch: np.ndarray, step: int) -> StepResult:
        """One optimizer step on a global batch of row numbers.

        The loss of every micro-batch is a sum and is divided by the weight of the whole global batch, which is known
        beforehand; so neither accumulation, nor ragged lengths, nor the number of processes change the gradient.
        """
        session, training = self.session, self.recipe.training
        weight = float(self.split.weights[batch].sum())
        self.module.train()
        session.watchdog.arm()
        if training.micro_batch == AUTO and session.world_size == 1:
            total = retry_on_oom(self, batch, lambda: self._accumulate(self.share(batch), weight, step))
        else:
            total = self._accumulate(self.share(batch), weight, step)
        norm = self._grad_norm(training.max_grad_norm)
        loss = float(self._sum(total)) / weight if weight else 0.0
        result = StepResult(loss, weight, norm, len(batch), int(self.split.lengths[batch].sum()))
        if result.finite:
            self.optimizer.step()
            self.recipe.method.on_step_end(self.model, step + 1)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def share(self, batch: np.ndarray) -> list[MicroBatch]:
        """This process's passes of a global batch."""
        return shard_batch(
            batch,
            self.split.lengths,
            rank=self.session.rank,
            world_size=self.session.world_size,
            micro_batch=self.micro_batch,
            micro_tokens=pass_tokens(self.recipe.training, self.session.device.type),
        )

    def _accumulate(self, micro: Sequence[MicroBatch], weight: float, step: int) -> torch.Tensor:
        session = self.session
        total = torch.zeros((), device=session.device)
        for number, piece in enumerate(micro):
            seed_micro_batch(self.recipe.training.seed, step, number, session.rank)
            batch = self.batch(piece.rows)
            last = number == len(micro) - 1
            # DDP averages gradients over processes; the sum over the global batch is wanted
            scale = session.world_size / weight if piece.counts and weight else 0.0
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.module):
                loss = self._pass(batch, scale, last=last)
            if piece.counts:
                total += unshard(loss)
            session.watchdog.report_progress()
        return total

    def _pass(self, batch: dict[str, torch.Tensor], scale: float, *, last: bool) -> torch.Tensor:
        """Forward and backward; returns the loss alone, so that the next pass finds the graph of this one gone.

        What bitsandbytes' INT8 layers keep for the backward pass lives as long as their node of the graph.
        """
        with self.session.accelerator.autocast():
            loss: torch.Tensor = self.module(batch)
        self.session.watchdog.report_progress()
        objective = loss * scale
        if last and (penalty := self.recipe.method.penalty(self.model)) is not None:
            objective = objective + penalty  # the same on every process, hence also their average
        self.session.backward(objective, last=last)
        return loss.detach()

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows as padded tensors on this process's device."""
        batch = self.split.batch(rows, self.tokenizer)
        return {name: tensor.to(self.session.device, non_blocking=True) for name, tensor in batch.items()}

    def _grad_norm(self, limit: float | None) -> float:
        norm = self.session.accelerator.clip_grad_norm_(self._parameters, limit or float("inf"))
        return float(unshard(norm)) if norm is not None else 0.0

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.session.accelerator.reduce(value, "sum") if self.session.world_size > 1 else value
