"""One optimizer step, and the module that runs every forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from peftkit.data.batching import (
    TEXT_INPUTS,
    MicroBatch,
    cut_texts,
    keeps_graphs,
    pass_tokens,
    shard_batch,
    text_passes,
)
from peftkit.data.pipeline import EncodedSplit
from peftkit.distributed.session import Session
from peftkit.distributed.sharding import unshard
from peftkit.errors import RecipeError
from peftkit.models.architectures import reads_padding
from peftkit.schema.head import Head
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel
from peftkit.training.frozen_trunk import FEATURES, FrozenTrunk

ForwardPass = Literal["loss", "outputs", "loss_and_measures", "batch_sums", "reference_outputs", "vectors"]
"""The forward passes of a head, by the name of its method."""


class TaskModule(torch.nn.Module):
    """A model with its head, as the one module that Accelerate wraps for several processes."""

    def __init__(self, loaded: LoadedModel, head: Head) -> None:
        super().__init__()
        self.model = loaded.model
        self.head, self.pooling = head, loaded.pooling
        # block classes, each sharded on its own by FSDP
        self._no_split_modules = list(getattr(loaded.model, "_no_split_modules", None) or [])
        self.unpadded = reads_padding(loaded.model)
        """Whether batches must have rows of one length."""
        self.trunk: FrozenTrunk | None = None
        """The frozen lower part of the model; it stays in evaluation mode."""
        self._mode: bool | None = None  # set by ``train``

    def forward(self, batch: dict[str, torch.Tensor], *, outputs: bool = False, use: ForwardPass = "loss") -> Any:
        """The summed loss (a scalar), or with ``outputs`` the tensors that evaluation needs, one row per example.

        ``use`` names another of the head's forward passes. A batch with ``features`` (see ``training.features``) enters
        the model above its frozen trunk.
        """
        head = self.head
        passes: dict[str, Callable[..., Any]] = {
            "loss": head.loss, "outputs": head.outputs, "loss_and_measures": head.loss_and_measures,
            "batch_sums": head.batch_sums, "reference_outputs": head.reference_outputs,
            "vectors": head.vectors,
        }  # fmt: skip
        forward = passes["outputs" if outputs else use]
        features = batch.get(FEATURES)
        if features is None or self.trunk is None:
            return forward(self.model, batch, self.pooling)
        with self.trunk.replay(features):
            rest = {name: tensor for name, tensor in batch.items() if name != FEATURES}
            return forward(self.model, rest, self.pooling)

    def freeze_trunk(self, trunk: FrozenTrunk) -> None:
        """Keep a trunk in evaluation mode from now on."""
        self.trunk, self._mode = trunk, None

    def train(self, mode: bool = True) -> TaskModule:
        """Set the mode of all modules but the trunk's: dropout there would change its cached outputs."""
        if self._mode == mode == self.training == self.model.training:
            return self  # visiting every module at every step costs more than a step on cached features
        super().train(mode)
        self._mode = mode
        for module in self.trunk.eval_modules if self.trunk else ():
            module.eval()
        return self


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimizer step over its global batch."""

    loss: float
    """Mean over the scored examples or tokens, of which there are ``weight``."""
    weight: float
    grad_norm: float
    rows: int
    tokens: int
    measures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The head's measures by name: a sum over the global batch, and what divides it."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


@dataclass
class Stepper:
    """Runs optimizer steps: forward and backward of every micro-batch, clipping, one update.

    The loss of a micro-batch is a sum, divided by the weight of the whole global batch: so accumulation, ragged lengths
    and the number of processes do not change the gradient.
    """

    recipe: Recipe
    session: Session
    module: torch.nn.Module
    """The TaskModule, wrapped by Accelerate."""
    optimizer: Any
    scheduler: Any
    split: EncodedSplit
    tokenizer: Any
    on_gradients: Callable[[], None] = lambda: None
    """Called before every update with finite gradients, while they exist."""

    def __post_init__(self) -> None:
        self._parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        rows = self.recipe.training.micro_batch
        self.micro_batch: int | None = rows if isinstance(rows, int) else None
        """Maximum rows per micro-batch."""
        if self.session.sharded and self.unwrapped.head.compares_rows:
            raise RecipeError(
                f"task.kind={self.recipe.task.kind} compares the rows of a batch and was never tried with weights that "
                "are sharded over the processes (FSDP, DeepSpeed); launch processes that each hold the whole model"
            )

    @functools.cached_property
    def unwrapped(self) -> TaskModule:
        """The module without Accelerate's wrappers; cached, since unwrapping searches all of its modules."""
        module: TaskModule = self.session.accelerator.unwrap_model(self.module)
        return module

    @property
    def model(self) -> Any:
        """The model that the method built."""
        return self.unwrapped.model

    @functools.cached_property
    def head(self) -> Head:
        """The head of the model."""
        return self.unwrapped.head

    def run(self, batch: np.ndarray, step: int) -> StepResult:
        """Run one optimizer step on a global batch of row numbers."""
        weight = self.split.weight(batch, self.tokenizer)
        tokens = int(self.split.lengths[batch].sum())
        self.module.train()
        self.session.watchdog.arm()
        total = self.accumulate(batch, weight, step)
        limit = self.recipe.training.max_grad_norm or float("inf")
        norm = self.session.accelerator.clip_grad_norm_(self._parameters, limit)  # None with DeepSpeed
        if self.session.world_size > 1:
            total = self.session.accelerator.reduce(total, "sum")
        summed, *rest = total.flatten().tolist()
        loss = summed / weight if weight else 0.0
        measures = dict(zip(self.head.measures, zip(rest[::2], rest[1::2], strict=True), strict=True))
        length = 0.0 if norm is None else float(unshard(norm))
        result = StepResult(loss, weight, length, len(batch), tokens, measures)
        if result.finite:
            self.on_gradients()
            self.optimizer.step()
            self.recipe.method.on_step_end(self.model, step + 1)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def micro_batches(self, batch: np.ndarray) -> list[MicroBatch]:
        """This process's micro-batches of a global batch."""
        session = self.session
        return shard_batch(
            batch, self.split.lengths, rank=session.rank, world_size=session.world_size, micro_batch=self.micro_batch,
            micro_tokens=pass_tokens(self.recipe.training, session.device.type), unpadded=self.unwrapped.unpadded,
        )  # fmt: skip

    def accumulate(self, batch: np.ndarray, weight: float, step: int) -> torch.Tensor:
        """Accumulate the gradients of this process's micro-batches; returns their summed loss.

        Where the head has ``measures``, the sums and divisors of these follow the loss.
        """
        session = self.session
        measures = self.head.measures
        if self.head.compares_rows:
            return self._accumulate_compared(batch, weight, step)
        total = torch.zeros(1 + 2 * len(measures) if measures else (), device=session.device)
        micro_batches = self.micro_batches(batch)
        shared = self._batch_sums(micro_batches, step) if self.head.sums_batches else {}
        for number, micro_batch in enumerate(micro_batches):
            seed_micro_batch(self.recipe.training.seed, step, number, session.rank)
            last = number == len(micro_batches) - 1
            # DDP averages gradients over processes, but the sum over the global batch is needed
            scale = session.world_size / weight if micro_batch.counts and weight else 0.0
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.module):
                loss = self._forward_backward(self.collate(micro_batch.rows) | shared, scale, last=last)
            if micro_batch.counts:
                total += unshard(loss)
            session.watchdog.report_progress()
        return total

    def _accumulate_compared(self, batch: np.ndarray, weight: float, step: int) -> torch.Tensor:
        """``accumulate`` where the loss compares the rows of the batch with each other; see ``Head.vectors``."""
        session, micro_batches = self.session, self.micro_batches(batch)
        collated = self.collate(np.concatenate([each.rows for each in micro_batches]))
        passes = self.passes_over(collated, micro_batches)
        texts = [cut_texts(collated, indices) for indices in passes]
        padded = sum(each["input_ids"].numel() for each in texts)
        # of several processes only the last pass may meet the others in its backward, which kept graphs do not allow
        twice = session.world_size > 1 or not keeps_graphs(self.recipe.training, padded, session.device.type)
        with torch.set_grad_enabled(not twice):
            parts = [self._vectors(each, step, number) for number, each in enumerate(texts)]
        order = torch.from_numpy(np.argsort(np.concatenate(passes))).to(session.device)
        vectors = torch.cat([part.detach() for part in parts])[order]
        total, gradients = self._loss_of_vectors(vectors, collated, micro_batches, weight)
        for number, indices in enumerate(passes):
            last = number == len(passes) - 1
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.module):
                embedded = self._vectors(texts[number], step, number) if twice else parts[number]
                parts[number] = torch.empty(0)  # frees the activations after their backward pass
                objective = (embedded * gradients[indices]).sum()
                if last and (penalty := self.recipe.method.penalty(self.model)) is not None:
                    objective = objective + penalty
                session.backward(objective, last=last)
            session.watchdog.report_progress()
        return total if session.is_main else torch.zeros_like(total)

    def _loss_of_vectors(
        self, vectors: torch.Tensor, batch: dict[str, torch.Tensor], micro_batches: list[MicroBatch], weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of the global batch, and its gradient by this process's vectors [texts, width].

        Every process computes the loss of all vectors, so that only these are exchanged, and no gradients.
        """
        session, each = self.session, len(vectors) // len(batch["weight"])
        counts = torch.tensor([one.counts for one in micro_batches for _ in one.rows], device=vectors.device)
        own = counts.repeat_interleave(each)
        shards = session.all_gather_rows(vectors[own])
        compared = torch.cat(shards).requires_grad_()
        columns = {name: tensor[counts] for name, tensor in batch.items() if name not in TEXT_INPUTS}
        rows = {name: torch.cat(session.all_gather_rows(tensor)) for name, tensor in columns.items()}
        total = self.head.batch_loss(compared, rows)
        # DDP averages gradients over processes, but their sum is needed
        (total * (session.world_size / weight if weight else 0.0)).backward()
        assert compared.grad is not None
        before = sum(map(len, shards[: session.rank]))
        gradients = torch.zeros_like(vectors)
        gradients[own] = compared.grad[before : before + int(own.sum())]
        return total.detach(), gradients

    def passes_over(self, batch: dict[str, torch.Tensor], micro_batches: list[MicroBatch]) -> list[np.ndarray]:
        """The passes of a batch whose rows are compared, as the numbers of their texts.

        Several processes need as many as each other: theirs are the micro-batches.
        """
        lengths = batch["attention_mask"].sum(dim=1).cpu().numpy()
        texts = len(lengths) // len(batch["weight"])
        if self.session.world_size > 1:
            ends = np.cumsum([len(each.rows) * texts for each in micro_batches])
            return np.split(np.arange(len(lengths)), ends[:-1])
        return text_passes(
            lengths, self.recipe.training, self.session.device.type, unpadded=self.unwrapped.unpadded,
            most=self.micro_batch and self.micro_batch * texts,
        )  # fmt: skip

    def _vectors(self, batch: dict[str, torch.Tensor], step: int, number: int) -> torch.Tensor:
        """The head's vectors of a pass; called twice, it draws the same dropout."""
        seed_micro_batch(self.recipe.training.seed, step, number, self.session.rank)
        with self.session.accelerator.autocast():
            vectors: torch.Tensor = self.module(batch, use="vectors")
        self.session.watchdog.report_progress()
        return vectors

    @torch.no_grad()
    def _batch_sums(self, micro_batches: list[MicroBatch], step: int) -> dict[str, torch.Tensor]:
        """The head's sums over the global batch, which every micro-batch is given."""
        session, totals = self.session, []
        for number, micro_batch in enumerate(micro_batches):
            seed_micro_batch(self.recipe.training.seed, step, number, session.rank)
            with session.accelerator.autocast():
                sums = self.module(self.collate(micro_batch.rows), use="batch_sums")
            totals.append(sums if micro_batch.counts else torch.zeros_like(sums))
            session.watchdog.report_progress()
        total = torch.stack(totals).sum(0)
        return {"batch_sums": session.accelerator.reduce(total, "sum") if session.world_size > 1 else total}

    def _forward_backward(self, batch: dict[str, torch.Tensor], scale: float, *, last: bool) -> torch.Tensor:
        """The detached loss: its graph, and with it what bitsandbytes' INT8 layers saved, is freed on return.

        The head's measures, where it has any, follow the loss.
        """
        measures = None
        with self.session.accelerator.autocast():
            if self.head.measures:
                loss, measures = self.module(batch, use="loss_and_measures")
            else:
                loss = self.module(batch)
        self.session.watchdog.report_progress()
        objective = loss * scale
        if last and (penalty := self.recipe.method.penalty(self.model)) is not None:
            objective = objective + penalty  # equal on all processes, so DDP's average leaves it as it is
        self.session.backward(objective, last=last)
        loss = loss.detach()
        return loss if measures is None else torch.cat([unshard(loss)[None], measures.flatten().to(torch.float32)])

    def collate(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows as padded tensors on this process's device."""
        return self.session.on_device(self.split.batch(rows, self.tokenizer))


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seeds torch as a function of the position in training, so that a resumed run needs no stored random state."""
    sequence = np.random.SeedSequence((seed, step, micro_batch, rank))
    value = int(sequence.generate_state(1, np.uint64)[0]) >> 1  # numpy 1 shifts no uint64 by an int
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would record a call, with its traceback, for every kind of device that is absent
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    if torch.xpu.is_available():
        torch.xpu.manual_seed_all(value)
